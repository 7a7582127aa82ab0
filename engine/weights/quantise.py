"""Float weights to 8-bit integers."""

import numpy as np
from numpy.typing import NDArray

from engine.weights.tensor import F32, U8


def quantise_q8_0(values: F32) -> U8:
    """Raw q8_0 blocks, flat uint8: runs of 32 values, each with an f16 scale max|x|/127."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    # Divide by the scale as stored, so that rounding it to f16 costs nothing more; a zero block stays zero.
    divisors = scales.astype(np.float32)
    divisors[divisors == 0] = 1
    quants = np.clip(np.rint(blocks / divisors), -127, 127).astype(np.int8)
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = scales.view(np.uint8)
    out[:, 2:] = quants.view(np.uint8)
    return out.reshape(-1)


def quantise_per_channel(values: F32) -> tuple[NDArray[np.int8], F32]:
    """INT8 with one scale per row (output channel): int8[rows, cols] and float32[rows], value = scale · q."""
    scales = np.abs(values).max(axis=1) / np.float32(127)
    divisors = np.where(scales == 0, np.float32(1), scales)
    quants = np.clip(np.rint(values / divisors[:, None]), -127, 127).astype(np.int8)
    return quants, scales.astype(np.float32)
