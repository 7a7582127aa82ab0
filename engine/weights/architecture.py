"""What a Llama-architecture model is made of: canonical tensor names and the shape each must have."""

from collections.abc import Mapping
from pathlib import Path

from engine.config import ModelConfig
from engine.weights.errors import ModelFileError
from engine.weights.tensor import Tensor


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by canonical name; matrices are (outputs, inputs)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, hidden), "output_norm": (hidden,)}
    if not config.tied_embeddings:
        shapes["output"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        shapes |= {
            prefix + "attn_norm": (hidden,),
            prefix + "attn_q": (query, hidden),
            prefix + "attn_k": (key, hidden),
            prefix + "attn_v": (key, hidden),
            prefix + "attn_output": (hidden, query),
            prefix + "ffn_norm": (hidden,),
            prefix + "ffn_gate": (inner, hidden),
            prefix + "ffn_up": (inner, hidden),
            prefix + "ffn_down": (hidden, inner),
        }
    return shapes


def check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelFileError naming the first tensor that is missing, of a wrong shape, or unknown."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelFileError(
                f"{path}: tensor {name!r} is missing; the file is incomplete, fetch it again"
            )
        if tensors[name].shape != shape:
            raise ModelFileError(
                f"{path}: tensor {name!r} has shape {tensors[name].shape}, its configuration says {shape}"
            )
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise ModelFileError(
            f"{path}: tensor {unknown[0]!r} is not part of the plain Llama architecture; "
            "leaving it out would change every answer, so this model cannot be served"
        )


def check_config(path: Path, config: ModelConfig) -> None:
    """Raise ModelFileError naming the first figure that the engine cannot compute with."""
    for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
        if getattr(config, field) < 1:
            raise ModelFileError(f"{path}: {field} is {getattr(config, field)}; the file is damaged")
    if config.num_heads % config.num_kv_heads:
        raise ModelFileError(
            f"{path}: {config.num_heads} query heads cannot share {config.num_kv_heads} KV heads evenly"
        )
    if config.head_dim % 2:
        raise ModelFileError(f"{path}: head size {config.head_dim} is odd; rotary positions need pairs")
