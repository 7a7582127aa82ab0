"""Keys and values as they lie in a block: 8-bit integers, and a float a token.

Of one layer and KV head, block of 32 tokens: the integers, then 32 floats. K counts from 0, so that its bytes are
unsigned: [2 halves][head_dim / 4][16 tokens][4 dims]; V is signed: [8 groups][head_dim][4 tokens]. Both are the order
that dot products of four bytes and tiles want, so nothing is rearranged when they are read.
"""

from typing import Any

import numpy as np

from engine.kernels import simd
from engine.kernels.jit import inline

BLOCK_TOKENS = 32
MAX_QUANTUM = np.float32(127.0)
KEY_OFFSET = 128
"""What the bytes of K are raised by."""
ZERO = np.float32(0.0)


@inline
def scales_at(head_dim: int) -> int:
    """Where the scales of K or V of one head lie: behind its integers."""
    return BLOCK_TOKENS * head_dim


@inline
def head_bytes(head_dim: int) -> int:
    """K or V of one head over a block: as `KVLayout.bytes_per_token` counts."""
    return BLOCK_TOKENS * (head_dim + 4)


@inline
def amplitude(source: int, head_dim: int) -> Any:
    """Largest |x| of a head's floats."""
    top = simd.splat_f32(ZERO)
    for at in range(0, head_dim * 4, 64):
        top = simd.larger(simd.absolute(simd.load_f32(source + at)), top)
    return simd.largest(top)


@inline
def inverse(top: float) -> Any:
    """What floats with this amplitude are multiplied by to become integers."""
    return MAX_QUANTUM / top if top > ZERO else ZERO


@inline
def write_key(source: int, head_dim: int, slot: int, target: int) -> None:
    """One token's K of a head into column `slot` of a block."""
    top = amplitude(source, head_dim)
    factor, offset = simd.splat_f32(inverse(top)), simd.splat_i32(KEY_OFFSET)
    half = slot // 16 * (head_dim // 4 * 64) + slot % 16 * 4
    for dim in range(0, head_dim, 16):
        integers = simd.nearest(simd.load_f32(source + dim * 4) * factor) + offset
        simd.scatter_i8(target + half + dim * 16, integers, 4, 64)
    simd.write_f32(target + scales_at(head_dim) + slot * 4, top / MAX_QUANTUM)


@inline
def write_value(source: int, head_dim: int, slot: int, target: int) -> None:
    """One token's V of a head into row `slot` of a block."""
    top = amplitude(source, head_dim)
    factor = simd.splat_f32(inverse(top))
    for dim in range(0, head_dim, 16):
        integers = simd.nearest(simd.load_f32(source + dim * 4) * factor)
        simd.scatter_i8(target + (slot // 4 * head_dim + dim) * 4 + slot % 4, integers, 1, 4)
    simd.write_f32(target + scales_at(head_dim) + slot * 4, top / MAX_QUANTUM)
