"""Model files: from a path to quantised tensors under canonical names."""

from engine.weights.errors import ModelFileError
from engine.weights.load import ModelWeights, load_weights
from engine.weights.tensor import Tensor, dequantise

__all__ = ["ModelFileError", "ModelWeights", "Tensor", "dequantise", "load_weights"]
