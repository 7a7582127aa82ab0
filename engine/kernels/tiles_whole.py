"""Products whose weights are whole integers, on AMX tiles: 16 rows × 16 outputs × 64 inputs at a time.

Weights of 4 bits become whole integers w = D · q + M of 12 bits, two signed bytes as activations are: four tile
products of 64 inputs into four tiles of sums that stay where they are over many inputs. Weights of 8 bits with one
float an output are one byte: two products. Integers and floats are those of `matmul.py`.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import amx, simd
from engine.kernels.amx import TILE_BYTES
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.matmul import fetch_ahead, scales_ir, unpack_ir
from engine.kernels.packing import BLOCK_BYTES, CHANNEL, FACTORED, SCALE_BYTES
from engine.kernels.quantised import (
    LIMB_BYTES,
    ROW_STEP_BYTES,
    STEP_BYTES,
    TILE_ROWS,
    tile_place,
)
from engine.kernels.simd import F32, F32_LANES, I8, I16, I32_LANES, I64, LANES

Builder = Any
MAX_STEPS = 9
"""Steps of 64 inputs whose weights stay in the first cache, with the rows that pass: 18 KiB."""
MAX_TILES = 32
"""Tiles of rows in one call: bounds the partial sums kept between two stretches of inputs."""
LIMBS = (2, 0, 1)
"""Bytes of a weight in the tiles, by form; none where weights are not whole integers."""
SUM_TILES = 4
PARTIAL_BYTES = MAX_TILES * TILE_BYTES
SPILL_BYTES = 2 * SUM_TILES * TILE_BYTES


def scratch_bytes(num_inputs: int) -> int:
    """Working memory for one thread."""
    return SPILL_BYTES + PARTIAL_BYTES + -(-num_inputs // 64) * STEP_BYTES


@intrinsic
def _expand_factored(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel's whole integers as limbs, STEP_BYTES for each step of 64 inputs: high bytes, then low."""
    shorts, bytes64 = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)

    def all16(value: int) -> Any:
        return ir.Constant(shorts, [value] * 2 * LANES)

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scale_base = simd.place(b, panel_, blocks_, BLOCK_BYTES[FACTORED])
        with cgutils.for_range(b, blocks_) as loop:
            fetch_ahead(b, FACTORED, panel_, loop.index)
            pairs = scales_ir(b, FACTORED, simd.place(b, scale_base, loop.index, SCALE_BYTES[FACTORED]))
            # The second of each pair, twice.
            high16, sixteen = (ir.Constant(I32_LANES, [value] * LANES) for value in (0xFFFF0000, 16))
            factor, addend = (
                b.bitcast(b.or_(b.and_(value, high16), b.lshr(value, sixteen)), shorts) for value in pairs
            )
            # w + 8 = 16 · high + (low + 8), where low + 8 is what the last four bits hold.
            addend = b.add(addend, all16(8))
            step, half = b.lshr(loop.index, ir.Constant(I64, 1)), b.and_(loop.index, ir.Constant(I64, 1))
            to = simd.place(b, simd.place(b, target_, step, STEP_BYTES), half, TILE_BYTES // 2)
            groups = unpack_ir(b, FACTORED, simd.place(b, panel_, loop.index, BLOCK_BYTES[FACTORED]))
            for group, value in enumerate(groups):
                nibbles = b.bitcast(value, shorts)
                even, odd = (
                    b.add(b.mul(q, factor), addend)
                    for q in (b.and_(nibbles, all16(255)), b.lshr(nibbles, all16(8)))
                )
                high = b.or_(
                    b.and_(b.lshr(even, all16(4)), all16(255)), b.and_(b.shl(odd, all16(4)), all16(0xFF00))
                )
                rest = b.or_(b.and_(even, all16(15)), b.shl(b.and_(odd, all16(15)), all16(8)))
                rest = b.sub(b.bitcast(rest, bytes64), ir.Constant(bytes64, [8] * 4 * LANES))
                simd.store(b, high, simd.offset(b, to, 64 * group), 64)
                simd.store(b, rest, simd.offset(b, to, TILE_BYTES + 64 * group), 64)
        with b.if_then(b.trunc(blocks_, ir.IntType(1))):
            # Half a step is left over: weights of zero.
            to = simd.place(b, target_, b.lshr(blocks_, ir.Constant(I64, 1)), STEP_BYTES)
            for limb in (0, TILE_BYTES):
                for line in range(TILE_BYTES // 2, TILE_BYTES, 64):
                    simd.store(b, ir.Constant(I32_LANES, [0] * LANES), simd.offset(b, to, limb + line), 64)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@intrinsic
def _expand_channel(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel's bytes with their signs, TILE_BYTES for each step of 64 inputs."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        signs, zero = (ir.Constant(I32_LANES, [value] * LANES) for value in (0x80808080, 0))
        with cgutils.for_range(b, blocks_) as loop:
            fetch_ahead(b, CHANNEL, panel_, loop.index)
            to = simd.place(b, target_, loop.index, BLOCK_BYTES[CHANNEL])
            at = simd.place(b, panel_, loop.index, BLOCK_BYTES[CHANNEL])
            for group, value in enumerate(unpack_ir(b, CHANNEL, at)):
                simd.store(b, b.xor(value, signs), simd.offset(b, to, 64 * group), 64)
        with b.if_then(b.trunc(blocks_, ir.IntType(1))):
            to = simd.place(b, target_, blocks_, BLOCK_BYTES[CHANNEL])
            for line in range(0, BLOCK_BYTES[CHANNEL], 64):
                simd.store(b, zero, simd.offset(b, to, line), 64)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@intrinsic
def _multiply_steps(context: Any, form: Any, weights: Any, steps: Any, rows: Any, spill: Any) -> Any:
    """16 rows times 16 outputs over some steps: the tiles of sums into `spill`."""
    limbs = LIMBS[form.literal_value]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, weights_, steps_, rows_, spill_ = args
        for tile in range(2 * limbs):
            amx.zero(b, tile)
        with cgutils.for_range(b, steps_) as loop:
            x, w = (
                simd.place(b, rows_, loop.index, STEP_BYTES),
                simd.place(b, weights_, loop.index, limbs * TILE_BYTES),
            )
            amx.load(b, 4, x, ROW_STEP_BYTES)
            amx.load(b, 6, w)
            amx.dot(b, "ss", 0, 4, 6)
            amx.load(b, 5, simd.offset(b, x, LIMB_BYTES), ROW_STEP_BYTES)
            amx.dot(b, "ss", 1, 5, 6)
            if limbs == 2:
                amx.load(b, 7, simd.offset(b, w, TILE_BYTES))
                amx.dot(b, "ss", 2, 4, 7)
                amx.dot(b, "ss", 3, 5, 7)
        for tile in range(2 * limbs):
            amx.store(b, tile, simd.offset(b, spill_, tile * TILE_BYTES))
        return c.get_dummy_value()

    return types.none(form, *[types.int64] * 4), codegen


def _whole(builder: Builder, form: int, spill: Any, row: int) -> Any:
    """The whole integers of one row of a spill."""
    four, five = (ir.Constant(I32_LANES, [bits] * LANES) for bits in (4, 5))
    parts = [
        simd.load(builder, simd.offset(builder, spill, tile * TILE_BYTES + 64 * row), I32_LANES, 64)
        for tile in range(2 * LIMBS[form])
    ]
    # By the weights' high byte first, then by the low one: in each the rows' h in front of their l.
    by_limb = [builder.add(builder.shl(h, five), low) for h, low in zip(parts[::2], parts[1::2], strict=True)]
    return by_limb[0] if len(by_limb) == 1 else builder.add(builder.shl(by_limb[0], four), by_limb[1])


@intrinsic
def _keep(context: Any, form: Any, joined: Any, spill: Any, partial: Any) -> Any:
    """A spill's integers as the partial sums of 16 rows, added to those there when `joined`."""
    code, with_partial = form.literal_value, joined.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        for r in range(TILE_ROWS):
            at, value = simd.offset(b, args[3], 64 * r), _whole(b, code, args[2], r)
            if with_partial:
                value = b.add(value, simd.load(b, at, I32_LANES, 64))
            simd.store(b, value, at, 64)
        return c.get_dummy_value()

    return types.none(form, joined, types.int64, types.int64), codegen


@intrinsic
def _finish(
    context: Any,
    form: Any,
    joined: Any,
    spill: Any,
    partial: Any,
    count: Any,
    row_scale: Any,
    scales: Any,
    out: Any,
    stride: Any,
    add: Any,
) -> Any:
    """A spill's integers, with the partial sums when `joined`, of `count` rows, scaled, to `out`."""
    code, with_partial = form.literal_value, joined.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, spill_, partial_, count_, row_scale_, scales_, out_, stride_, add_ = args
        factor = simd.load(b, row_scale_, F32_LANES, 64)

        def row(r: int, adds: bool) -> None:
            total = _whole(b, code, spill_, r)
            if with_partial:
                at = simd.offset(b, partial_, 64 * r)
                total = b.add(total, simd.load(b, at, I32_LANES, 64))
            scale = simd.load(b, simd.offset(b, scales_, 4 * r), F32, 4)
            value = b.fmul(b.sitofp(total, F32_LANES), factor)
            value = b.fmul(value, simd.splat(b, scale, F32_LANES))
            target = b.add(out_, b.mul(stride_, ir.Constant(I64, r)))
            if adds:
                value = b.fadd(simd.load(b, target, F32_LANES), value)
            simd.store(b, value, target)

        with b.if_else(b.icmp_signed("!=", add_, ir.Constant(I64, 0))) as (onto, over):
            for branch, adds in ((onto, True), (over, False)):
                with (
                    branch,
                    b.if_else(b.icmp_signed("==", count_, ir.Constant(I64, TILE_ROWS))) as (full, part),
                ):
                    with full:
                        for r in range(TILE_ROWS):
                            row(r, adds)
                    with part:
                        for r in range(TILE_ROWS):
                            with b.if_then(b.icmp_signed("<", ir.Constant(I64, r), count_)):
                                row(r, adds)
        return c.get_dummy_value()

    return types.none(form, joined, *[types.int64] * 8), codegen


@inline
def multiply(
    form: int,
    first: int,
    last: int,
    panel: int,
    num_blocks: int,
    x: int,
    scales: int,
    out: int,
    out_stride: int,
    add: int,
    scratch: int,
) -> None:
    """At most MAX_TILES tiles of rows times one panel whose weights are whole integers."""
    partial = scratch + SPILL_BYTES
    expanded = partial + PARTIAL_BYTES
    if form == FACTORED:
        _expand_factored(panel, num_blocks, expanded)
    else:
        _expand_channel(panel, num_blocks, expanded)
    step_bytes = LIMBS[form] * TILE_BYTES
    steps = (num_blocks + 1) // 2
    row_scale = panel + num_blocks * (BLOCK_BYTES[form] + SCALE_BYTES[form])
    for begin in range(0, steps, MAX_STEPS):
        count = min(MAX_STEPS, steps - begin)
        # The sums of a tile are read while the next one is at work, when they have reached the cache.
        for row in range(first, last + TILE_ROWS, TILE_ROWS):
            turn = (row - first) // TILE_ROWS % 2
            if row < last:
                at = x + tile_place(row, num_blocks) + begin * STEP_BYTES
                weights = expanded + begin * step_bytes
                _multiply_steps(form, weights, count, at, scratch + turn * SUM_TILES * TILE_BYTES)
            done = row - TILE_ROWS
            if done < first:
                continue
            spill, sums = scratch + (1 - turn) * SUM_TILES * TILE_BYTES, partial + (done - first) * 64
            here, stored = out + done * out_stride, min(TILE_ROWS, last - done)
            if begin + count < steps and begin == 0:
                _keep(form, 0, spill, sums)
            elif begin + count < steps:
                _keep(form, 1, spill, sums)
            elif begin > 0:
                _finish(form, 1, spill, sums, stored, row_scale, scales + done * 4, here, out_stride, add)
            else:
                _finish(form, 0, spill, sums, stored, row_scale, scales + done * 4, here, out_stride, add)
