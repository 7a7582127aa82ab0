"""What happens to a row between matrices: norm, quantisation, rotary positions, SiLU, embedding.

Addresses are bytes; a row is float32.
"""

import numpy as np

from engine.kernels import simd
from engine.kernels.jit import jit
from engine.kernels.matmul import TILE_BYTES, TILE_SUMS_BYTES

MAX_QUANTUM = np.float32(2039.0)
"""Largest |x| of a quantised activation: 16 · 127 + 7, so that both limbs fit a signed byte."""
ONE = np.float32(1.0)
ZERO = np.float32(0.0)


@jit
def quantise_row(source: int, length: int, quantised: int, sums: int, scale: int) -> None:
    """Row of floats to 12-bit integers (h and l per block of 32), float sums per block and one scale.

    The row's blocks lie `TILE_BYTES` apart at `quantised`, its sums `TILE_SUMS_BYTES` apart at `sums`.
    """
    top = simd.splat_f32(ZERO)
    for at in range(0, length * 4, 64):
        top = simd.larger(simd.absolute(simd.load_f32(source + at)), top)
    amplitude = simd.largest(top)
    inverse = ZERO
    if amplitude > ZERO:
        inverse = MAX_QUANTUM / amplitude
    simd.write_f32(scale, amplitude / MAX_QUANTUM)
    factor, eight, sixteen = simd.splat_f32(inverse), simd.splat_i32(8), simd.splat_i32(16)
    for block in range(length // 32):
        target = quantised + block * TILE_BYTES
        first = simd.nearest(simd.load_f32(source + block * 128) * factor)
        second = simd.nearest(simd.load_f32(source + block * 128 + 64) * factor)
        high = simd.shift_right(first + eight, 4)
        simd.store_i8(target, high)
        simd.store_i8(target + 32, first - high * sixteen)
        high = simd.shift_right(second + eight, 4)
        simd.store_i8(target + 16, high)
        simd.store_i8(target + 48, second - high * sixteen)
        simd.write_f32(sums + block * TILE_SUMS_BYTES, np.float32(simd.total_i32(first + second)))


@jit
def norm_row(source: int, weight: int, length: int, epsilon: float, target: int) -> None:
    """RMS norm of a row."""
    squares = simd.splat_f32(ZERO)
    for at in range(0, length * 4, 64):
        x = simd.load_f32(source + at)
        squares = simd.fma(x, x, squares)
    mean = simd.total(squares) / np.float32(length)
    factor = simd.splat_f32(ONE / np.sqrt(mean + epsilon))
    for at in range(0, length * 4, 64):
        simd.store_f32(target + at, simd.load_f32(source + at) * factor * simd.load_f32(weight + at))


@jit
def gate_rows(gate: int, up: int, count: int, target: int, target_stride: int) -> None:
    """silu(gate) · up for `count` rows of 16 floats, 64 bytes apart."""
    one, zero = simd.splat_f32(ONE), simd.splat_f32(ZERO)
    for row in range(count):
        g = simd.load_f32(gate + row * 64)
        sigmoid = simd.quotient(one, one + simd.exp(zero - g))
        simd.store_f32(target + row * target_stride, g * sigmoid * simd.load_f32(up + row * 64))


@jit
def rotate_row(source: int, angles: int, num_heads: int, head_dim: int, factor: float, target: int) -> None:
    """Rotary positions on interleaved pairs of each head; result · factor.

    `angles` holds, for one position, head_dim cosines (each twice), then head_dim signed sines (-s, s).
    """
    scale = simd.splat_f32(factor)
    for head in range(num_heads):
        for at in range(0, head_dim * 4, 64):
            here = source + head * head_dim * 4 + at
            x = simd.load_f32(here)
            turned = simd.fma(
                simd.swap_pairs(x), simd.load_f32(angles + head_dim * 4 + at), x * simd.load_f32(angles + at)
            )
            simd.store_f32(target + head * head_dim * 4 + at, turned * scale)


@jit
def embed(matrix: int, token: int, target: int) -> None:
    """One row of a packed matrix, dequantised."""
    form, data, panel_bytes, num_blocks = (
        simd.read_i64(matrix),
        simd.read_i64(matrix + 8),
        simd.read_i64(matrix + 16),
        simd.read_i64(matrix + 24),
    )
    panel, lane = data + token // 16 * panel_bytes, token % 16
    block_bytes = 512 if form == 2 else 256
    scale_bytes = 64 if form == 0 else 32
    for block in range(num_blocks):
        scales = panel + num_blocks * block_bytes + block * scale_bytes + lane * 2
        d = simd.read_f16(scales)
        m = ZERO
        zero = 0
        if form == 0:
            m = simd.read_f16(scales + 32)
        elif form == 1:
            zero = 8
        else:
            zero = 128
        for each in range(32):
            group, byte = each // 4, each % 4
            if form == 2:
                q = simd.read_u8(panel + block * block_bytes + group * 64 + lane * 4 + byte)
            else:
                q = simd.read_u8(panel + block * block_bytes + group % 4 * 64 + lane * 4 + byte)
                q = q >> 4 if group >= 4 else q & 15
            simd.write_f32(target + (block * 32 + each) * 4, np.float32(q - zero) * d + m)
