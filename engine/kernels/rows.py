"""What happens to a row between matrices: norm, quantisation, rotary positions, SiLU, embedding.

Addresses are bytes; a row is float32.
"""

import numpy as np

from engine.kernels import simd
from engine.kernels.isa import Isa
from engine.kernels.jit import jit
from engine.kernels.octet_rows import write_octets
from engine.kernels.outlier_lists import (
    EVEN_ROWS,
    LISTED_APART_FROM,
    SHARING_ROWS,
    beyond_place,
    even_lists,
    list_of_row,
    list_of_two,
)
from engine.kernels.packing import BLOCK_BYTES, FACTORED, SCALE_BYTES
from engine.kernels.quantised import (
    OCTETS,
    clear_rest,
    layout_of,
    row_place,
    sums_place,
    write_block,
)
from engine.weights.quantise import MAX_ACTIVATION, MAX_OCTET

MAX_QUANTUM = np.float32(MAX_ACTIVATION)
OCTET = np.float32(MAX_OCTET)
INFINITY, NOT_A_NUMBER = np.float32(np.inf), np.float32(np.nan)
TINY = np.float32(2.0**-126)
"""A smaller step has no reciprocal among floats: its row is zeros."""
LOWEST_EXPONENT = np.float32(-126.0)
"""2 to its negative is a float, and its reciprocal a normal one."""
GATED_AHEAD = 8
"""So many rows ahead is fetched where results go: pages apart, the hardware does not see it."""
ONE = np.float32(1.0)
ZERO = np.float32(0.0)


@jit
def quantise_row(
    isa: Isa,
    form: int,
    num_rows: int,
    row: int,
    source: int,
    length: int,
    quantised: int,
    sums: int,
    scales: int,
    means: float,
    ahead: int,
) -> None:
    """Row `row` of `num_rows`, floats, for weights of `form`: to 12-bit integers, their sums per block of 32 and one
    scale, among those of all rows at `quantised`, `sums` and `scales`, see `quantised.py`.

    For 8-bit weights the largest is MAX_ACTIVATION; for those of 4 bits a byte holds all but outliers, which are at
    least about `means` (4 or more) times the row's mean |x|. A row that is not all finite becomes zeros whose scale is
    not a number, and so is what comes of it. Rows 4n to 4n + 3 are quantised one after the other, by one thread.
    `ahead`: as many floats that are wanted next, which are fetched meanwhile.
    """
    top, size = simd.splat_f32(ZERO), simd.splat_f32(ZERO)
    for at in range(0, length * 4, 64):
        magnitude = simd.absolute(simd.load_f32(source + at))
        top, size = simd.larger(magnitude, top), size + magnitude
    quantum, inverse, whole = simd.largest(top) / MAX_QUANTUM, ZERO, simd.total(size)
    is_finite = whole < INFINITY
    if form == FACTORED:
        quantum = max(quantum, whole / np.float32(length) * means / OCTET)
    if not is_finite:
        quantum = NOT_A_NUMBER
    elif quantum >= TINY:
        inverse = ONE / quantum
    simd.write_f32(scales + row * 4, quantum)
    num_blocks, layout = length // 32, layout_of(isa, form, num_rows)
    own, own_sums = quantised + row_place(layout, row, num_blocks), sums + sums_place(row, num_blocks)
    if layout == OCTETS:
        beyond = quantised + beyond_place(row, num_blocks) if num_rows < LISTED_APART_FROM else 0
        write_octets(isa, source, inverse, is_finite, num_blocks, own, own_sums, beyond, ahead)
        if not beyond:
            list_of_row(row, source, inverse, num_blocks, quantised, sums)
            if row % EVEN_ROWS == EVEN_ROWS - 1 or row == num_rows - 1:
                begin = row - row % EVEN_ROWS
                even_lists(begin, row + 1 - begin, num_blocks, quantised, sums)
        elif row % SHARING_ROWS == SHARING_ROWS - 1 or row == num_rows - 1:
            begin = row - row % SHARING_ROWS
            list_of_two(begin, row + 1 - begin, num_blocks, quantised, sums)
        return
    clear_rest(own, num_blocks)
    factor = simd.splat_f32(inverse)
    for block in range(num_blocks):
        simd.fetch(ahead + block * 128)
        simd.fetch(ahead + block * 128 + 64)
        first, second = simd.splat_i32(0), simd.splat_i32(0)
        if is_finite:
            first = simd.nearest(simd.load_f32(source + block * 128) * factor)
            second = simd.nearest(simd.load_f32(source + block * 128 + 64) * factor)
        write_block(layout, first, second, own, block, own_sums)


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
    log2_e, lowest = simd.splat_f32(simd.LOG2_E), simd.splat_f32(LOWEST_EXPONENT)
    for row in range(count):
        simd.fetch(target + (row + GATED_AHEAD) * target_stride)
        g = simd.load_f32(gate + row * 64)
        sigmoid = simd.quotient(one, one + simd.exp2(zero - simd.larger(g * log2_e, lowest)))
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
    row_scale = ONE
    scales = panel + num_blocks * BLOCK_BYTES[form]
    if form == FACTORED:
        row_scale = simd.read_f32(scales + num_blocks * SCALE_BYTES[FACTORED] + lane * 4)
    for block in range(num_blocks):
        here = scales + block * SCALE_BYTES[form] + lane * 2
        if form == FACTORED:
            factor, addend, scale = simd.read_i16(here), simd.read_i16(here + 32), row_scale
        else:
            factor, addend, scale = 1, -128, simd.read_f16(here)
        for each in range(32):
            group, byte = each // 4, each % 4
            integers = panel + block * BLOCK_BYTES[form] + lane * 4 + byte
            if form == FACTORED:
                q = simd.read_u8(integers + group % 4 * 64)
                q = q >> 4 if group >= 4 else q & 15
            else:
                q = simd.read_u8(integers + group * 64)
            simd.write_f32(target + (block * 32 + each) * 4, np.float32(factor * q + addend) * scale)
