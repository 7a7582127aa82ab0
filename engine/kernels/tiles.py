"""Matrix products on AMX tiles: 16 rows × 16 outputs × 64 inputs at a time.

Weights of 4 bits become whole integers w = D · q + M of 12 bits, two signed bytes as activations are: four tile
products of 64 inputs into four tiles of sums that stay where they are over many inputs. Weights of 8 bits with one
float an output are one byte: two products. Those with a float a block: their sums leave the tiles after every block of
32. Integers and floats are those of `matmul.py`.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import amx, simd
from engine.kernels.amx import TILE_BYTES
from engine.kernels.isa import Isa
from engine.kernels.jit import cgutils, inline, intrinsic, jit, overload, types
from engine.kernels.matmul import (
    LIMB_BYTES,
    ROW_STEP_BYTES,
    STEP_BYTES,
    SUM_BYTES,
    SUM_FLOAT,
    TILE_ROWS,
    TILE_SUMS_BYTES,
    block_of_rows,
    fetch_ahead,
    multiply_panel,
    scales_ir,
    sums_place,
    tile_place,
    unpack_ir,
)
from engine.kernels.packing import BLOCK_BYTES, CHANNEL, FACTORED, Q8_0, SCALE_BYTES
from engine.kernels.simd import F32, F32_LANES, I8, I16, I32_LANES, I64, LANES

Builder = Any
MIN_ROWS = (8, 13, 8)
"""By form: fewer rows than this are quicker without tiles, for expanding a panel costs as much as some rows without."""
MIN_REST = 3
"""Once a panel is expanded, tiles are quicker for so many rows left over."""
MAX_STEPS = 9
"""Steps of 64 inputs whose weights stay in the first cache, with the rows that pass: 18 KiB."""
MAX_TILES = 32
"""Tiles of rows in one call: bounds the partial sums kept between two stretches of inputs."""
LIMBS = (2, 0, 1)
"""Bytes of a weight in the tiles, by form; none where weights are not whole integers."""
SUM_TILES = 4
PARTIAL_BYTES = MAX_TILES * TILE_BYTES
LAG = 2
"""A tile's integers are read so many blocks after they were stored: a tile store is not forwarded to a load, which
would wait until it has reached the cache."""
SPILLS = 4
"""Places for them in turn, a power of two above LAG."""
SPILL_BYTES = 2 * SPILLS * TILE_BYTES
Q8_BYTES = BLOCK_BYTES[Q8_0] + 128
"""One block of an 8-bit panel ready for the tiles: integers, then factor and addend as floats."""


def _at(builder: Builder, base: Any, index: Any, num_bytes: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(I64, num_bytes)))


@intrinsic
def _expand_factored(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel's whole integers as limbs, STEP_BYTES for each step of 64 inputs: high bytes, then low."""
    shorts, bytes64 = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)

    def all16(value: int) -> Any:
        return ir.Constant(shorts, [value] * 2 * LANES)

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scale_base = _at(b, panel_, blocks_, BLOCK_BYTES[FACTORED])
        with cgutils.for_range(b, blocks_) as loop:
            fetch_ahead(b, FACTORED, panel_, loop.index)
            pairs = scales_ir(b, FACTORED, _at(b, scale_base, loop.index, SCALE_BYTES[FACTORED]))
            # The second of each pair, twice.
            high16, sixteen = (ir.Constant(I32_LANES, [value] * LANES) for value in (0xFFFF0000, 16))
            factor, addend = (
                b.bitcast(b.or_(b.and_(value, high16), b.lshr(value, sixteen)), shorts) for value in pairs
            )
            # w + 8 = 16 · high + (low + 8), where low + 8 is what the last four bits hold.
            addend = b.add(addend, all16(8))
            step, half = b.lshr(loop.index, ir.Constant(I64, 1)), b.and_(loop.index, ir.Constant(I64, 1))
            to = _at(b, _at(b, target_, step, STEP_BYTES), half, TILE_BYTES // 2)
            groups = unpack_ir(b, FACTORED, _at(b, panel_, loop.index, BLOCK_BYTES[FACTORED]))
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
            to = _at(b, target_, b.lshr(blocks_, ir.Constant(I64, 1)), STEP_BYTES)
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
            to = _at(b, target_, loop.index, BLOCK_BYTES[CHANNEL])
            at = _at(b, panel_, loop.index, BLOCK_BYTES[CHANNEL])
            for group, value in enumerate(unpack_ir(b, CHANNEL, at)):
                simd.store(b, b.xor(value, signs), simd.offset(b, to, 64 * group), 64)
        with b.if_then(b.trunc(blocks_, ir.IntType(1))):
            to = _at(b, target_, blocks_, BLOCK_BYTES[CHANNEL])
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
            x, w = _at(b, rows_, loop.index, STEP_BYTES), _at(b, weights_, loop.index, limbs * TILE_BYTES)
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
def _multiply_whole(
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


@intrinsic
def _expand_q8(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """An 8-bit panel to `num_blocks` × Q8_BYTES."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scale_base = _at(b, panel_, blocks_, BLOCK_BYTES[Q8_0])
        with cgutils.for_range(b, blocks_) as loop:
            to = _at(b, target_, loop.index, Q8_BYTES)
            fetch_ahead(b, Q8_0, panel_, loop.index)
            for group, value in enumerate(unpack_ir(b, Q8_0, _at(b, panel_, loop.index, BLOCK_BYTES[Q8_0]))):
                simd.store(b, value, simd.offset(b, to, 64 * group), 64)
            for index, value in enumerate(
                scales_ir(b, Q8_0, _at(b, scale_base, loop.index, SCALE_BYTES[Q8_0]))
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
            return simd.offset(b, _at(b, spills_, turn, 2 * TILE_BYTES), TILE_BYTES * tile)

        with cgutils.for_range(b, b.add(blocks_, ir.Constant(I64, LAG))) as loop:
            with b.if_then(b.icmp_signed("<", loop.index, blocks_)):
                rows = block_of_rows(b, x_, loop.index)
                amx.load(b, 6, _at(b, panel_, loop.index, Q8_BYTES))
                for limb in (0, 1):
                    amx.zero(b, limb)
                    amx.load(b, 4 + limb, simd.offset(b, rows, LIMB_BYTES * limb), ROW_STEP_BYTES)
                    amx.dot(b, "su", limb, 4 + limb, 6)
                    amx.store(b, limb, spill(loop.index, limb))
            with b.if_then(b.icmp_signed(">=", loop.index, ir.Constant(I64, LAG))):
                block = b.sub(loop.index, ir.Constant(I64, LAG))
                weights = _at(b, panel_, block, Q8_BYTES)
                d, m = (
                    simd.load(b, simd.offset(b, weights, BLOCK_BYTES[Q8_0] + at), F32_LANES, 64)
                    for at in (0, 64)
                )
                sums_at = _at(b, sums_, block, TILE_SUMS_BYTES)
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


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply_panel_by_tiles` for one thread."""
    factored = PARTIAL_BYTES + -(-num_inputs // 64) * STEP_BYTES
    return SPILL_BYTES + max(factored, num_inputs // 32 * Q8_BYTES)


@inline
def config_of(form: int) -> int:
    """Which configuration of the tiles products with weights of `form` want."""
    return amx.HALF if form == Q8_0 else amx.FULL


@jit
def multiply_panel_by_tiles(
    form: int,
    first: int,
    last: int,
    panel: int,
    num_blocks: int,
    x: int,
    sums: int,
    scales: int,
    out: int,
    out_stride: int,
    add: int,
    scratch: int,
) -> None:
    """`matmul.multiply_panel` on tiles, which must be configured; the rows' buffers are padded to 16 rows."""
    if form != Q8_0:
        for begin in range(first, last, MAX_TILES * TILE_ROWS):
            stop = min(last, begin + MAX_TILES * TILE_ROWS)
            if form == 0:
                _multiply_whole(0, begin, stop, panel, num_blocks, x, scales, out, out_stride, add, scratch)
            else:
                _multiply_whole(2, begin, stop, panel, num_blocks, x, scales, out, out_stride, add, scratch)
        return
    expanded = scratch + SPILL_BYTES
    _expand_q8(panel, num_blocks, expanded)
    for row in range(first, last, TILE_ROWS):
        count = min(TILE_ROWS, last - row)
        a, s = x + tile_place(row, num_blocks), sums + sums_place(row, num_blocks)
        f, o = scales + row * 4, out + row * out_stride
        _tile_by_q8(count, expanded, num_blocks, a, s, f, o, out_stride, add, scratch)


def multiply(
    isa: Isa, form: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` the quickest way the path has, with the tiles configured as `config_of(form)`."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(multiply)
def _multiply(
    isa: Any,
    form: Any,
    first: Any,
    last: Any,
    panel: Any,
    num_blocks: Any,
    x: Any,
    sums: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    scratch: Any,
) -> Any:
    def plainly(
        isa: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        multiply_panel(isa, form, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    def by_tiles(
        isa: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        middle = first
        if last - first >= MIN_ROWS[form]:
            rest = (last - first) % TILE_ROWS
            middle = last if rest >= MIN_REST else last - rest
        if middle > first:
            multiply_panel_by_tiles(
                form, first, middle, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
            )
        if last > middle:
            multiply_panel(isa, form, middle, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    return by_tiles if isa.tag == "amx" else plainly
