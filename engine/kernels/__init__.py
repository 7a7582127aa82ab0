"""The engine's kernels: the whole transformer step as a few compiled functions."""

from engine.kernels.isa import Isa, available, choose
from engine.kernels.jit import Progress
from engine.kernels.warm import warm

__all__ = ["Isa", "Progress", "available", "choose", "warm"]
