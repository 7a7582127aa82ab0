"""Products of pairs of 16-bit integers: machines that have no dot product of four bytes.

Few rows: Σ q·x of a block of 32 inputs, then what scales the block, while weights stream by. Many rows: a panel becomes
whole integers of 16 bits once, w = D · q + M or q - 128, and a product is pairs times pairs to its end. Integers and
floats are those of `matmul.py`.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import avx2, simd
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, overload, types
from engine.kernels.matmul import PAIRS, fetch_ahead, scale_and_store
from engine.kernels.packing import BLOCK_BYTES, CHANNEL, FACTORED, Q8_0, SCALE_BYTES
from engine.kernels.quantised import (
    BY_OCTETS,
    ROW_STEP_BYTES,
    SHORTS,
    STEP_BYTES,
    SUM_BYTES,
    SUM_FLOAT,
    SUM_WORD,
    TILE_SUMS_BYTES,
    block_of_rows,
    sums_place,
    tile_place,
)
from engine.kernels.simd import F16, F32, F32_LANES, I16, I32, I32_LANES, I64, LANES

Builder = Any
SHORT_LANES = ir.VectorType(I16, 2 * LANES)
PAIRS_OF_BLOCK = 16
"""Vectors of pairs in a block of 32 inputs, each for 16 outputs."""
EXPANDED_BYTES = PAIRS_OF_BLOCK * 64
"""One block of a panel as whole integers."""
MAX_STEPS = 9
"""Steps of 64 inputs whose weights stay in the first cache: 18 KiB."""
MAX_ROWS = 256
"""Rows of one call: bounds the sums kept between two stretches of inputs."""
PARTIAL_BYTES = MAX_ROWS * 64


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply_whole` for one thread."""
    return PARTIAL_BYTES + -(-num_inputs // 64) * STEP_BYTES


def _shorts(value: int) -> Any:
    return ir.Constant(SHORT_LANES, [value] * 2 * LANES)


def _pairs_ir(builder: Builder, form: int, address: Any) -> Any:
    """(index, unsigned weights as pairs of 16 bits) of one block of a panel, loaded one after another."""
    eight, four, low, nibble = _shorts(8), _shorts(4), _shorts(255), _shorts(15)
    for group in range(4 if form == FACTORED else 8):
        at = simd.offset(builder, address, 64 * group)
        value = builder.bitcast(simd.load(builder, at, I32_LANES, 64), SHORT_LANES)
        if form != FACTORED:
            yield 2 * group, builder.and_(value, low)
            yield 2 * group + 1, builder.lshr(value, eight)
            continue
        # Group g lies in the low halves of bytes, g + 4 in the high ones.
        yield 2 * group, builder.and_(value, nibble)
        yield 2 * group + 1, builder.and_(builder.lshr(value, eight), nibble)
        yield 2 * group + 8, builder.and_(builder.lshr(value, four), nibble)
        yield 2 * group + 9, builder.lshr(value, _shorts(12))


def _integers_of_block(builder: Builder, scales: Any) -> list[Any]:
    """D and M of one block of a panel, 16 shorts each."""
    kind = ir.VectorType(I16, LANES)
    return [simd.load(builder, simd.offset(builder, scales, at), kind, 32) for at in (0, 32)]


def _zeros(builder: Builder, kind: Any, count: int) -> list[Any]:
    return [cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * LANES)) for _ in range(count)]


def _with_pairs(builder: Builder, tag: str, num_rows: int, acc: Any, weights: Any, x: Any) -> Any:
    """`PAIRS` for one of so many rows whose sums are in registers."""
    total = PAIRS[tag](builder, acc, weights, x)
    return avx2.pinned(builder, total) if tag in BY_OCTETS and num_rows >= avx2.PINNED_ROWS else total


@intrinsic
def _few_by_panel(
    context: Any, isa: Any, form: Any, rows: Any, panel: Any, num_blocks: Any, x: Any, sums: Any, scales: Any,
    out: Any, out_stride: Any, add: Any,
) -> Any:  # fmt: skip
    """`rows` rows times one panel; see `matmul.multiply_panel`."""
    if not (isinstance(isa, IsaType) and isinstance(form, types.IntegerLiteral)):
        return None
    tag, code, count = isa.tag, form.literal_value, rows.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, panel_, blocks_, x_, sums_, scales_, out_, out_stride_, add_ = args
        accs = _zeros(b, F32_LANES if code == Q8_0 else I32_LANES, count)
        scale_base = simd.place(b, panel_, blocks_, BLOCK_BYTES[code])
        with cgutils.for_range(b, blocks_) as loop:
            fetch_ahead(b, code, panel_, loop.index)
            rows_at = block_of_rows(b, SHORTS, x_, loop.index)
            # Integers of 8 bits with one float an output add up over all blocks.
            parts = [b.load(acc) if code == CHANNEL else ir.Constant(I32_LANES, [0] * LANES) for acc in accs]
            for index, weights in _pairs_ir(b, code, simd.place(b, panel_, loop.index, BLOCK_BYTES[code])):
                for r in range(count):
                    x_pair = simd.splat_word(b, simd.offset(b, rows_at, ROW_STEP_BYTES * r + 4 * index))
                    w = b.bitcast(weights, I32_LANES)
                    parts[r] = _with_pairs(b, tag, count, parts[r], w, x_pair)
            scale_at = simd.place(b, scale_base, loop.index, SCALE_BYTES[code])
            sums_at = simd.place(b, sums_, loop.index, TILE_SUMS_BYTES)
            if code == FACTORED:
                factor, addend = (b.sext(value, I32_LANES) for value in _integers_of_block(b, scale_at))
            elif code == Q8_0:
                d = b.fpext(simd.load(b, scale_at, ir.VectorType(F16, LANES), 32), F32_LANES)
                offset = b.fmul(d, ir.Constant(F32_LANES, [-128.0] * LANES))
            for r, (acc, part) in enumerate(zip(accs, parts, strict=True)):
                at = simd.offset(b, sums_at, SUM_BYTES * r)
                if code == Q8_0:
                    total = simd.splat(b, simd.load(b, simd.offset(b, at, SUM_FLOAT), F32, 4), F32_LANES)
                    value = simd.fma_ir(b, b.sitofp(part, F32_LANES), d, b.load(acc))
                    b.store(simd.fma_ir(b, total, offset, value), acc)
                    continue
                total = simd.splat_word(b, simd.offset(b, at, SUM_WORD))
                if code == CHANNEL:
                    b.store(b.sub(part, b.shl(total, ir.Constant(I32_LANES, [7] * LANES))), acc)
                else:
                    b.store(b.add(b.load(acc), b.add(b.mul(part, factor), b.mul(total, addend))), acc)
        row_scale = simd.place(b, scale_base, blocks_, SCALE_BYTES[code])
        for r in range(count):
            target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
            scale_and_store(b, code, b.load(accs[r]), row_scale, simd.offset(b, scales_, 4 * r), target, add_)
        return c.get_dummy_value()

    return types.none(isa, form, rows, *[types.int64] * 8), codegen


@intrinsic
def expand(context: Any, form: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel's whole integers as pairs, EXPANDED_BYTES a block."""
    code = form.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, panel_, blocks_, target_ = args
        scale_base = simd.place(b, panel_, blocks_, BLOCK_BYTES[code])
        twice = ir.Constant(ir.VectorType(I32, 2 * LANES), [lane // 2 for lane in range(2 * LANES)])
        with cgutils.for_range(b, blocks_) as loop:
            fetch_ahead(b, code, panel_, loop.index)
            to = simd.place(b, target_, loop.index, EXPANDED_BYTES)
            factor, addend = _shorts(1), _shorts(-128)
            if code == FACTORED:
                integers = _integers_of_block(b, simd.place(b, scale_base, loop.index, SCALE_BYTES[code]))
                factor, addend = (b.shuffle_vector(value, value, twice) for value in integers)
            for index, weights in _pairs_ir(b, code, simd.place(b, panel_, loop.index, BLOCK_BYTES[code])):
                simd.store(b, b.add(b.mul(weights, factor), addend), simd.offset(b, to, 64 * index), 64)
        with b.if_then(b.trunc(blocks_, ir.IntType(1))):
            # Half a step is left over: weights of zero.
            to = simd.place(b, target_, blocks_, EXPANDED_BYTES)
            for line in range(0, EXPANDED_BYTES, 64):
                simd.store(b, _shorts(0), simd.offset(b, to, line), 64)
        return c.get_dummy_value()

    return types.none(form, *[types.int64] * 3), codegen


@intrinsic
def _multiply_steps(
    context: Any, isa: Any, rows: Any, joined: Any, weights: Any, steps: Any, x: Any, ahead: Any, partial: Any
) -> Any:
    """`rows` rows times 16 outputs over some steps into `partial` [row][16], added to what is there when `joined`.

    The next rows, which lie `ahead` of these, are fetched meanwhile."""
    if not isinstance(isa, IsaType):
        return None
    tag, count, with_partial = isa.tag, rows.literal_value, joined.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, weights_, steps_, x_, ahead_, partial_ = args
        accs = _zeros(b, I32_LANES, count)
        for r, acc in enumerate(accs):
            b.store(ir.Constant(I32_LANES, [0] * LANES), acc)
            if with_partial:
                b.store(simd.load(b, simd.offset(b, partial_, 64 * r), I32_LANES, 64), acc)
        with cgutils.for_range(b, b.shl(steps_, ir.Constant(I64, 3))) as loop:
            # Four pairs of inputs at a time, eight times a step.
            step, eighth = b.lshr(loop.index, ir.Constant(I64, 3)), b.and_(loop.index, ir.Constant(I64, 7))
            step_at = simd.place(b, x_, step, STEP_BYTES)
            rows_at = simd.place(b, step_at, eighth, 16)
            for line in range(count // 4):
                next_rows_at = b.add(simd.place(b, step_at, eighth, 16 * count), ahead_)
                simd.prefetch(b, simd.offset(b, next_rows_at, 64 * line), cache=1)
            weights_at = simd.place(b, weights_, loop.index, 4 * 64)
            for pair in range(4):
                w = simd.load(b, simd.offset(b, weights_at, 64 * pair), I32_LANES, 64)
                for r, acc in enumerate(accs):
                    x_pair = simd.splat_word(b, simd.offset(b, rows_at, ROW_STEP_BYTES * r + 4 * pair))
                    b.store(_with_pairs(b, tag, count, b.load(acc), w, x_pair), acc)
        for r, acc in enumerate(accs):
            simd.store(b, b.load(acc), simd.offset(b, partial_, 64 * r), 64)
        return c.get_dummy_value()

    return types.none(isa, rows, joined, *[types.int64] * 5), codegen


@intrinsic
def _finish(
    context: Any, partial: Any, row_scale: Any, scale: Any, out: Any, add: Any,
) -> Any:  # fmt: skip
    """One row's sums, scaled, to `out`."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        partial_, row_scale_, scale_, out_, add_ = args
        value = simd.load(b, partial_, I32_LANES, 64)
        scale_and_store(b, FACTORED, value, row_scale_, scale_, out_, add_)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 5), codegen


def group_rows(isa: Isa) -> int:
    """Rows whose sums stay in registers together, 4 or 8: AVX2 has 16 registers, of which each takes two; AVX-512 has
    32, of which each takes one."""
    raise NotImplementedError


@overload(group_rows)
def _group_rows(isa: Any) -> Any:
    def four(isa: Any) -> int:
        return 4

    def eight(isa: Any) -> int:
        return 8

    return four if isa.tag in BY_OCTETS else eight


@inline
def multiply_few(
    isa: Isa, form: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` block by block; `form` is a literal."""
    row = first
    while row < last:
        # Groups of 4, 2 and 1 from a multiple of 16 on: a group never straddles two tiles of rows.
        a, s = x + tile_place(row, num_blocks), sums + sums_place(row, num_blocks)
        f, o = scales + row * 4, out + row * out_stride
        if row + 4 <= last:
            _few_by_panel(isa, form, 4, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 4
        elif row + 3 <= last:
            _few_by_panel(isa, form, 3, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 3
        elif row + 2 <= last:
            _few_by_panel(isa, form, 2, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 2
        else:
            _few_by_panel(isa, form, 1, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 1


@inline
def multiply_whole(
    isa: Isa, form: int, first: int, last: int, panel: int, num_blocks: int, x: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """At most MAX_ROWS rows times one panel whose weights are whole integers; `form` is a literal."""
    expanded = scratch + PARTIAL_BYTES
    expand(form, panel, num_blocks, expanded)
    steps = (num_blocks + 1) // 2
    for begin in range(0, steps, MAX_STEPS):
        count = min(MAX_STEPS, steps - begin)
        weights = expanded + begin * STEP_BYTES
        row = first
        while row < last:
            at, partial = x + tile_place(row, num_blocks) + begin * STEP_BYTES, scratch + (row - first) * 64
            ahead = tile_place(row + group_rows(isa), num_blocks) - tile_place(row, num_blocks)
            # The rows' buffers are padded to whole tiles: what comes of the rest is not stored.
            if group_rows(isa) == 8:
                if begin == 0:
                    _multiply_steps(isa, 8, 0, weights, count, at, ahead, partial)
                else:
                    _multiply_steps(isa, 8, 1, weights, count, at, ahead, partial)
            elif begin == 0:
                _multiply_steps(isa, 4, 0, weights, count, at, ahead, partial)
            else:
                _multiply_steps(isa, 4, 1, weights, count, at, ahead, partial)
            row += group_rows(isa)
    row_scale = panel + num_blocks * (BLOCK_BYTES[form] + SCALE_BYTES[form])
    for row in range(first, last):
        _finish(scratch + (row - first) * 64, row_scale, scales + row * 4, out + row * out_stride, add)
