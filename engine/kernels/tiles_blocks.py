"""Products whose 8-bit weights have a float a block, on AMX tiles: their sums leave the tiles after every 32 inputs.

Integers and floats are those of `matmul.py`.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import amx, simd
from engine.kernels.amx import TILE_BYTES
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.matmul import fetch_ahead, scales_ir, unpack_ir
from engine.kernels.packing import BLOCK_BYTES, Q8_0, SCALE_BYTES
from engine.kernels.quantised import (
    LIMB_BYTES,
    LIMBS,
    ROW_STEP_BYTES,
    SUM_BYTES,
    SUM_FLOAT,
    TILE_ROWS,
    TILE_SUMS_BYTES,
    block_of_rows,
    sums_place,
    tile_place,
)
from engine.kernels.simd import F32, F32_LANES, I32_LANES, I64, LANES

Builder = Any
LAG = 2
"""A tile's integers are read so many blocks after they were stored: a tile store is not forwarded to a load, which
would wait until it has reached the cache."""
SPILLS = 4
"""Places for them in turn, a power of two above LAG."""
SPILL_BYTES = 2 * SPILLS * TILE_BYTES
Q8_BYTES = BLOCK_BYTES[Q8_0] + 128
"""One block of an 8-bit panel ready for the tiles: integers, then factor and addend as floats."""


def scratch_bytes(num_inputs: int) -> int:
    """Working memory for one thread."""
    return SPILL_BYTES + num_inputs // 32 * Q8_BYTES


@intrinsic
def _expand_q8(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """An 8-bit panel to `num_blocks` × Q8_BYTES."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scale_base = simd.place(b, panel_, blocks_, BLOCK_BYTES[Q8_0])
        with cgutils.for_range(b, blocks_) as loop:
            to = simd.place(b, target_, loop.index, Q8_BYTES)
            fetch_ahead(b, Q8_0, panel_, loop.index)
            for group, value in enumerate(
                unpack_ir(b, Q8_0, simd.place(b, panel_, loop.index, BLOCK_BYTES[Q8_0]))
            ):
                simd.store(b, value, simd.offset(b, to, 64 * group), 64)
            for index, value in enumerate(
                scales_ir(b, Q8_0, simd.place(b, scale_base, loop.index, SCALE_BYTES[Q8_0]))
            ):
                simd.store(b, value, simd.offset(b, to, BLOCK_BYTES[Q8_0] + 64 * index), 64)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@intrinsic
def _tile_by_q8(
    context: Any,
    count: Any,
    panel: Any,
    num_blocks: Any,
    x: Any,
    sums: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    spills: Any,
) -> Any:
    """Up to 16 rows (`count` of them are stored) times one expanded 8-bit panel."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        count_, panel_, blocks_, x_, sums_, scales_, out_, out_stride_, add_, spills_ = args
        zero = ir.Constant(F32_LANES, [0.0] * LANES)
        five = ir.Constant(I32_LANES, [5] * LANES)
        accs = [cgutils.alloca_once_value(b, zero) for _ in range(TILE_ROWS)]

        def spill(block: Any, tile: int) -> Any:
            turn = b.and_(block, ir.Constant(I64, SPILLS - 1))
            return simd.offset(b, simd.place(b, spills_, turn, 2 * TILE_BYTES), TILE_BYTES * tile)

        with cgutils.for_range(b, b.add(blocks_, ir.Constant(I64, LAG))) as loop:
            with b.if_then(b.icmp_signed("<", loop.index, blocks_)):
                rows = block_of_rows(b, LIMBS, x_, loop.index)
                amx.load(b, 6, simd.place(b, panel_, loop.index, Q8_BYTES))
                for limb in (0, 1):
                    amx.zero(b, limb)
                    amx.load(b, 4 + limb, simd.offset(b, rows, LIMB_BYTES * limb), ROW_STEP_BYTES)
                    amx.dot(b, "su", limb, 4 + limb, 6)
                    amx.store(b, limb, spill(loop.index, limb))
            with b.if_then(b.icmp_signed(">=", loop.index, ir.Constant(I64, LAG))):
                block = b.sub(loop.index, ir.Constant(I64, LAG))
                weights = simd.place(b, panel_, block, Q8_BYTES)
                d, m = (
                    simd.load(b, simd.offset(b, weights, BLOCK_BYTES[Q8_0] + at), F32_LANES, 64)
                    for at in (0, 64)
                )
                sums_at = simd.place(b, sums_, block, TILE_SUMS_BYTES)
                for r in range(TILE_ROWS):
                    high, low = (
                        simd.load(b, simd.offset(b, spill(block, limb), 64 * r), I32_LANES, 64)
                        for limb in (0, 1)
                    )
                    integer = b.add(b.shl(high, five), low)
                    acc = simd.fma_ir(b, b.sitofp(integer, F32_LANES), d, b.load(accs[r]))
                    at = simd.offset(b, sums_at, SUM_BYTES * r + SUM_FLOAT)
                    total = simd.splat(b, simd.load(b, at, F32, 4), F32_LANES)
                    b.store(simd.fma_ir(b, total, m, acc), accs[r])
        for r in range(TILE_ROWS):
            with b.if_then(b.icmp_signed("<", ir.Constant(I64, r), count_)):
                scale = simd.load(b, simd.offset(b, scales_, 4 * r), F32, 4)
                value = b.fmul(b.load(accs[r]), simd.splat(b, scale, F32_LANES))
                target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
                with b.if_else(b.icmp_signed("!=", add_, ir.Constant(I64, 0))) as (adds, stores):
                    with adds:
                        simd.store(b, b.fadd(simd.load(b, target, F32_LANES), value), target)
                    with stores:
                        simd.store(b, value, target)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 10), codegen


@inline
def multiply(
    first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int, out_stride: int,
    add: int, scratch: int,
) -> None:  # fmt: skip
    """All rows times one panel."""
    expanded = scratch + SPILL_BYTES
    _expand_q8(panel, num_blocks, expanded)
    for row in range(first, last, TILE_ROWS):
        count = min(TILE_ROWS, last - row)
        a, s = x + tile_place(row, num_blocks), sums + sums_place(row, num_blocks)
        f, o = scales + row * 4, out + row * out_stride
        _tile_by_q8(count, expanded, num_blocks, a, s, f, o, out_stride, add, scratch)
