"""Quantised rows as they lie in memory: 12-bit integers x, their sums per block of 32, one scale a row.

Tiles of 16 rows, one step of 64 inputs after another; in a step, 128 bytes a row. Two forms, by what a path multiplies:

- limbs, x = 32 · h + l, |h| < 64: of a step all h [64 bytes], then all l: dot products of four bytes, and AMX tiles;
- shorts, 16 bits each (see `by_shorts`): of each group of 4 inputs the pairs (x0, x2) and (x1, x3), as the even
  and the odd bytes of packed weights come.

Sums of a row over a block: a word, (2 · Σ h, Σ l) as a pair of 16 bits with limbs and Σ x with shorts; then Σ x as a
float.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa
from engine.kernels.jit import inline, intrinsic, overload, types
from engine.kernels.simd import I16, I64, LANES

Builder = Any
SHORTS, SHORTS_FOR_MANY = ("avx2",), ("vnni",)
"""Tags of the paths whose rows are shorts always, and where many rows go together."""
MANY_ROWS = 8
"""So many are quicker over a panel made whole integers of 16 bits than block by block."""
TILE_ROWS = 16
LIMB_BYTES = 64
ROW_STEP_BYTES = 2 * LIMB_BYTES
STEP_BYTES = TILE_ROWS * ROW_STEP_BYTES
SUM_WORD, SUM_FLOAT = 0, 4
SUM_BYTES = 8
TILE_SUMS_BYTES = TILE_ROWS * SUM_BYTES
LIMB_BITS = 5


@inline
def tile_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first block among quantised rows."""
    return row // TILE_ROWS * ((num_blocks + 1) // 2) * STEP_BYTES + row % TILE_ROWS * ROW_STEP_BYTES


@inline
def sums_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first sum."""
    return row // TILE_ROWS * num_blocks * TILE_SUMS_BYTES + row % TILE_ROWS * SUM_BYTES


def block_of_rows(builder: Builder, rows: Any, block: Any, block_bytes: int) -> Any:
    """Where a block of quantised rows lies in their first row; `block_bytes`: 32 for limbs (the h), 64 for shorts."""
    one = ir.Constant(I64, 1)
    step = builder.mul(builder.lshr(block, one), ir.Constant(I64, STEP_BYTES))
    half = builder.mul(builder.and_(block, one), ir.Constant(I64, block_bytes))
    return builder.add(rows, builder.add(step, half))


@intrinsic
def store_shorts(context: Any, address: Any, value: Any) -> Any:
    """The low halves of 16 lanes, each group of four as lanes 0, 2, 1, 3."""
    order = [group + lane for group in range(0, LANES, 4) for lane in (0, 2, 1, 3)]

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        shorts = b.trunc(a[1], ir.VectorType(I16, LANES))
        mask = ir.Constant(ir.VectorType(simd.I32, LANES), order)
        simd.store(b, b.shuffle_vector(shorts, shorts, mask), a[0])
        return c.get_dummy_value()

    return types.none(types.int64, simd.i32x16), codegen


@inline
def _write_limbs(first: Any, second: Any, step: int, block: int, sums: int) -> None:
    at, half, unit = (
        step + block % 2 * 32,
        simd.splat_i32(1 << (LIMB_BITS - 1)),
        simd.splat_i32(1 << LIMB_BITS),
    )
    high, high_second = simd.shift_right(first + half, LIMB_BITS), simd.shift_right(second + half, LIMB_BITS)
    simd.store_i8(at, high)
    simd.store_i8(at + 16, high_second)
    simd.store_i8(at + LIMB_BYTES, first - high * unit)
    simd.store_i8(at + LIMB_BYTES + 16, second - high_second * unit)
    total, total_high = simd.total_i32(first + second), simd.total_i32(high + high_second)
    simd.write_i32(sums + SUM_WORD, (2 * total_high & 0xFFFF) | ((total - (total_high << LIMB_BITS)) << 16))
    simd.write_f32(sums + SUM_FLOAT, np.float32(total))


@inline
def _write_shorts(first: Any, second: Any, step: int, block: int, sums: int) -> None:
    at = step + block % 2 * 64
    store_shorts(at, first)
    store_shorts(at + 32, second)
    total = simd.total_i32(first + second)
    simd.write_i32(sums + SUM_WORD, total)
    simd.write_f32(sums + SUM_FLOAT, np.float32(total))


@inline
def write_block(as_shorts: bool, first: Any, second: Any, step: int, block: int, sums: int) -> None:
    """Block `block` of a row: 2 · 16 integers into its step at `step`, their sums to `sums`."""
    if as_shorts:
        _write_shorts(first, second, step, block, sums)
    else:
        _write_limbs(first, second, step, block, sums)


def by_shorts(isa: Isa, num_rows: int) -> bool:
    """Whether `num_rows` rows that are multiplied together are shorts."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(by_shorts)
def _by_shorts(isa: Any, num_rows: Any) -> Any:
    def always(isa: Any, num_rows: Any) -> bool:
        return True

    def when_many(isa: Any, num_rows: Any) -> bool:
        return bool(num_rows >= MANY_ROWS)

    def never(isa: Any, num_rows: Any) -> bool:
        return False

    if isa.tag in SHORTS:
        return always
    return when_many if isa.tag in SHORTS_FOR_MANY else never
