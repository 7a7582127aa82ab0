"""Float weights to 8-bit integers."""

import numpy as np
from numpy.typing import NDArray

from engine.weights.tensor import F32, U8

I16 = NDArray[np.int16]
MAX_WEIGHT = 2039
"""Largest |D · q + M|: 16 · 127 + 7, so that it splits into two signed bytes as 16 · high + low."""
MAX_ACTIVATION = 2031
"""Largest |x| of a quantised activation: 32 · 63 + 15, two signed bytes whose first has 7 bits, so that its sum of
products with 32 weights of 4 bits fits 16."""
MAX_OCTET = 127
"""Largest |x| that is no outlier: a signed byte."""
NORMED_MEANS, MIXED_MEANS, GATED_MEANS = 4.0, 6.0, 8.0
"""How many times the mean |x| of its row an activation for 4-bit weights may be before it is an outlier, unless
MAX_ACTIVATION asks for larger steps: at most one in so many is one. After a norm, after attention, after SiLU: the
longer the tail, the less a coarser step costs, measured as in docs/benchmarks.md (Accuracy)."""
_ROUNDING = 5
"""|D · q + M| exceeds the exact value over s by less: 8 · 0.5 for D and 0.5 for M."""


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
    """INT8 with one scale per row (output channel): int8[rows, cols] and float32[rows], value = scale · q.

    As in the paper on CloudMatrix-Infer: its weights per channel, its activations per token. The scale is the smallest
    that keeps every |q| within 127 and every sum of a row's products with activations within 31 bits. Raises ValueError
    for rows so long that no scale does that.
    """
    num_inputs = values.shape[1]
    room = (2**31 - 1) // MAX_ACTIVATION - num_inputs
    if room <= 0:
        raise ValueError(f"a row of {num_inputs} inputs is longer than sums of 32 bits allow")
    sizes = np.abs(values)
    scales = np.maximum(sizes.max(axis=1) / 127, sizes.sum(axis=1, dtype=np.float64) / room).astype(
        np.float32
    )
    divisors = np.where(scales == 0, np.float32(1), scales)
    quants = np.clip(np.rint(values / divisors[:, None]), -127, 127).astype(np.int8)
    return quants, scales


def factor(d: NDArray[np.float16], m: NDArray[np.float16] | None) -> tuple[I16, I16, F32]:
    """Scales of 4-bit blocks as integers times one float a row: value = s · (D · q + M), q = 0..15.

    `d` and `m` are [rows, blocks of 32]: a block's values are d · q + m, or d · (q - 8) where `m` is None. Returns D
    and M, int16 [rows, blocks], and s, float32 [rows]. s is the smallest that keeps every |D · q + M| within MAX_WEIGHT
    and every sum of a row's products with activations within 31 bits, so that a product over all blocks needs no float
    before its end. Raises ValueError for rows so long that no scale does that.
    """
    exact_d = d.astype(np.float64)
    exact_m = -8 * exact_d if m is None else m.astype(np.float64)
    largest = np.maximum(np.abs(exact_m), np.abs(exact_m + 15 * exact_d))
    room = (2**31 - 1) // MAX_ACTIVATION - _ROUNDING * 32 * d.shape[1]
    if room <= 0:
        raise ValueError(f"a row of {32 * d.shape[1]} inputs is longer than sums of 32 bits allow")
    s = np.maximum(largest.max(axis=1) / (MAX_WEIGHT - _ROUNDING), 32 * largest.sum(axis=1) / room)
    # Rounded to float32 first, so that the integers are right for the scale as it is used.
    scale = np.nextafter(s.astype(np.float32), np.float32(np.inf))
    scale[s == 0] = 1
    exact_s = scale.astype(np.float64)[:, None]
    steps = np.rint(exact_d / exact_s)
    # What rounding D did to the middle of the block goes into M; without m, q = 8 stays exactly zero.
    addends = -8 * steps if m is None else np.rint((exact_m + 7.5 * exact_d) / exact_s - 7.5 * steps)
    return steps.astype(np.int16), addends.astype(np.int16), scale
