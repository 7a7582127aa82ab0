"""Quantised rows as they lie in memory: 12-bit integers x, their sums per block of 32, one scale a row.

Tiles of 16 rows, a step of 64 inputs 128 bytes a row. Three layouts, by what multiplies them (see `layout_of`):

- LIMBS, x = 32 · h + l, |h| < 64: step after step, a row's h [64 bytes], then its l: dot products of four bytes, and
  AMX tiles;
- SHORTS, 16 bits each: step after step, of each group of 4 inputs the pairs (x0, x2) and (x1, x3), as the even and the
  odd bytes of packed weights come;
- OCTETS, 8 bits each: step after step, 64 bytes a row, where an outlier, |x| > 127, is 0; what those are lies behind a
  tile's octets, see `outlier_lists.py`.

Sums of a row over a block, two words: with LIMBS the pair of 16 bits (2 · Σ h, Σ l) and Σ x as a float; with SHORTS Σ x
as an integer and as a float; with OCTETS, at the first block of a step, the pair of 16 bits (Σ x of it, Σ x of the
second) of those that are no outliers, and at each block which of its inputs are, as bits.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa
from engine.kernels.jit import inline, intrinsic, overload, types
from engine.kernels.packing import FACTORED
from engine.kernels.simd import I16, I32, I64, LANES

Builder = Any
LIMBS, SHORTS, OCTETS = range(3)
BY_OCTETS, BY_SHORTS = ("avx2",), ("vnni",)
"""Tags of the paths without a dot product of four bytes, and of those for which shorts are quicker with many rows."""
MANY_ROWS = 8
"""So many are quicker over a panel that was unpacked once for all of them."""
TILE_ROWS = 16
LIMB_BYTES = 64
ROW_STEP_BYTES = 2 * LIMB_BYTES
STEP_BYTES = TILE_ROWS * ROW_STEP_BYTES
OCTET_ROW_BYTES = 64
OCTET_STEP_BYTES = TILE_ROWS * OCTET_ROW_BYTES
OUTLIER_STEP_BYTES = 2 * OCTET_STEP_BYTES
"""Room for what is beyond octets, 16 bits each."""
PAIR_STEP_BYTES = 384 * TILE_ROWS
"""Room for the lists of two rows each: 32 entries of 24 bytes a step."""
OCTET_TILE_BYTES = OCTET_STEP_BYTES + OUTLIER_STEP_BYTES + PAIR_STEP_BYTES
"""Octets and outliers of a tile's rows, a step."""
SUM_WORD, SUM_FLOAT, OUTLIER_BITS = 0, 4, 4
SUM_BYTES = 8
TILE_SUMS_BYTES = TILE_ROWS * SUM_BYTES
LIMB_BITS = 5


def quantised_bytes(num_rows: int, num_inputs: int) -> int:
    """Room for so many rows, a multiple of TILE_ROWS, in whichever layout."""
    return num_rows * -(-num_inputs // 64) * max(ROW_STEP_BYTES, OCTET_TILE_BYTES // TILE_ROWS)


@inline
def tile_place(row: int, num_blocks: int) -> Any:
    """Byte offset of the first block of a row of limbs or shorts among quantised rows."""
    return row // TILE_ROWS * ((num_blocks + 1) // 2) * STEP_BYTES + row % TILE_ROWS * ROW_STEP_BYTES


@inline
def octets_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first octet among quantised rows."""
    return row // TILE_ROWS * ((num_blocks + 1) // 2) * OCTET_TILE_BYTES + row % TILE_ROWS * OCTET_ROW_BYTES


@inline
def outliers_place(row: int, num_blocks: int) -> Any:
    """Byte offset of what follows the octets of a row's tile among quantised rows."""
    steps = (num_blocks + 1) // 2
    return row // TILE_ROWS * steps * OCTET_TILE_BYTES + steps * OCTET_STEP_BYTES


@inline
def sums_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first sum."""
    return row // TILE_ROWS * num_blocks * TILE_SUMS_BYTES + row % TILE_ROWS * SUM_BYTES


def block_of_rows(builder: Builder, layout: int, rows: Any, block: Any) -> Any:
    """Where a block of quantised rows lies (of limbs: the h) in the first of them, which begins at `rows`."""
    one = ir.Constant(I64, 1)
    step_bytes, block_bytes = {
        LIMBS: (STEP_BYTES, 32),
        SHORTS: (STEP_BYTES, 64),
        OCTETS: (OCTET_STEP_BYTES, 32),
    }[layout]
    step = builder.mul(builder.lshr(block, one), ir.Constant(I64, step_bytes))
    half = builder.mul(builder.and_(block, one), ir.Constant(I64, block_bytes))
    return builder.add(rows, builder.add(step, half))


@intrinsic
def store_shorts(context: Any, address: Any, value: Any) -> Any:
    """The low halves of 16 lanes, each group of four as lanes 0, 2, 1, 3."""
    order = [group + lane for group in range(0, LANES, 4) for lane in (0, 2, 1, 3)]

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        shorts = b.trunc(a[1], ir.VectorType(I16, LANES))
        mask = ir.Constant(ir.VectorType(I32, LANES), order)
        simd.store(b, b.shuffle_vector(shorts, shorts, mask), a[0])
        return c.get_dummy_value()

    return types.none(types.int64, simd.i32x16), codegen


@inline
def row_place(layout: int, row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first block among quantised rows."""
    if layout == OCTETS:
        return octets_place(row, num_blocks)
    return tile_place(row, num_blocks)


@inline
def _write_limbs(first: Any, second: Any, row: int, block: int, sums: int) -> None:
    at, half, unit = (
        row + block // 2 * STEP_BYTES + block % 2 * 32,
        simd.splat_i32(1 << (LIMB_BITS - 1)),
        simd.splat_i32(1 << LIMB_BITS),
    )
    here = sums + block * TILE_SUMS_BYTES
    high, high_second = simd.shift_right(first + half, LIMB_BITS), simd.shift_right(second + half, LIMB_BITS)
    simd.store_i8(at, high)
    simd.store_i8(at + 16, high_second)
    simd.store_i8(at + LIMB_BYTES, first - high * unit)
    simd.store_i8(at + LIMB_BYTES + 16, second - high_second * unit)
    total, total_high = simd.total_i32(first + second), simd.total_i32(high + high_second)
    simd.write_i32(here + SUM_WORD, (2 * total_high & 0xFFFF) | ((total - (total_high << LIMB_BITS)) << 16))
    simd.write_f32(here + SUM_FLOAT, np.float32(total))


@inline
def _write_shorts(first: Any, second: Any, row: int, block: int, sums: int) -> None:
    at, here = row + block // 2 * STEP_BYTES + block % 2 * 64, sums + block * TILE_SUMS_BYTES
    store_shorts(at, first)
    store_shorts(at + 32, second)
    total = simd.total_i32(first + second)
    simd.write_i32(here + SUM_WORD, total)
    simd.write_f32(here + SUM_FLOAT, np.float32(total))


@inline
def clear_rest(row: int, num_blocks: int) -> None:
    """Before the blocks of a row of shorts or limbs are written: the half of its last step that is no input is zero for
    who goes by steps."""
    if num_blocks % 2:
        nothing = simd.splat_i32(0)
        last = row + num_blocks // 2 * STEP_BYTES
        simd.store_i32(last, nothing)
        simd.store_i32(last + 64, nothing)


@inline
def write_block(layout: int, first: Any, second: Any, row: int, block: int, sums: int) -> None:
    """Block `block` of a row of shorts or limbs: 2 · 16 integers into the row, which begins at `row`, their sums to its
    sums at `sums`."""
    if layout == SHORTS:
        _write_shorts(first, second, row, block, sums)
    else:
        _write_limbs(first, second, row, block, sums)


def layout_of(isa: Isa, form: int, num_rows: int) -> int:
    """How `num_rows` rows lie that are multiplied together with weights of `form`."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(layout_of)
def _layout_of(isa: Any, form: Any, num_rows: Any) -> Any:
    def without_dots(isa: Any, form: Any, num_rows: Any) -> int:
        return OCTETS if form == FACTORED else SHORTS

    def shorts_for_many(isa: Any, form: Any, num_rows: Any) -> int:
        return SHORTS if num_rows >= MANY_ROWS else LIMBS

    def limbs(isa: Any, form: Any, num_rows: Any) -> int:
        return LIMBS

    if isa.tag in BY_OCTETS:
        return without_dots
    return shorts_for_many if isa.tag in BY_SHORTS else limbs
