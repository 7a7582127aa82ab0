"""Outliers of rows times a panel of 4-bit weights, one by one, on top of what bytes gave: the end of a product."""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.matmul import PAIRS, scale_and_store
from engine.kernels.octet_panels import (
    ADDEND_AT,
    PACKED_ADDEND_AT,
    UNPACKED,
    after_integers,
    in_both_halves,
)
from engine.kernels.outlier_lists import (
    ENTRIES_OF_LINE,
    ENTRY_BYTES,
    FACTORS,
    LINE,
    PAIR,
    QUAD,
    SHARED_ENTRY_BYTES,
    SHARING_ROWS,
    SHIFT,
    list_place,
    listed_place,
    shared_list_place,
)
from engine.kernels.packing import BLOCK_BYTES, FACTORED, SCALE_BYTES
from engine.kernels.quantised import OCTET_ROW_BYTES, OCTET_STEP_BYTES
from engine.kernels.simd import I16, I32, I32_LANES, I64, LANES

Builder = Any
SHORT_LANES = ir.VectorType(I16, 2 * LANES)
RESULTS_AHEAD = 8
"""So many rows ahead is fetched where results go."""


def _field(builder: Builder, entry: Any, at: int) -> Any:
    return builder.zext(simd.load(builder, simd.offset(builder, entry, at), I32, 4), I64)


def _whole_pairs(builder: Builder, bytes_at: Any, shift: Any, mask: int, factor: Any, addend: Any) -> Any:
    """D · q + M of two inputs as pairs, see `shorts.expand`: q are the bytes of a line, moved and masked."""
    b = builder
    bytes_ = simd.load(b, bytes_at, I32_LANES, 64)
    moved = b.lshr(bytes_, simd.splat(b, b.trunc(shift, I32), I32_LANES))
    q, factor, addend = (
        b.bitcast(value, SHORT_LANES)
        for value in (b.and_(moved, ir.Constant(I32_LANES, [mask] * LANES)), factor, addend)
    )
    return b.bitcast(b.add(b.mul(q, factor), addend), I32_LANES)


def _pairs_of_unpacked(builder: Builder, entry: Any, lines: Any, factors: Any) -> Any:
    """`_whole_pairs` of a shared entry, from a panel that was unpacked to `lines`."""
    factors_at = builder.add(factors, _field(builder, entry, FACTORS))
    factor, addend = (
        simd.load(builder, simd.offset(builder, factors_at, at), I32_LANES, 64) for at in (0, ADDEND_AT)
    )
    bytes_at = builder.add(lines, _field(builder, entry, QUAD))
    return _whole_pairs(builder, bytes_at, _field(builder, entry, SHIFT), 0x00FF00FF, factor, addend)


def _pairs_of_packed(builder: Builder, entry: Any, panel: Any, scales: Any) -> Any:
    """`_whole_pairs` of a shared entry, from a panel as it is stored."""
    b, line_at = builder, _field(builder, entry, LINE)

    def bits(shift: int, mask: int) -> Any:
        return b.and_(b.lshr(line_at, ir.Constant(I64, shift)), ir.Constant(I64, mask))

    # A block has 16 lines: two of each of its 8 groups. Group g + 4 is the high halves of group g's bytes.
    block = b.lshr(line_at, ir.Constant(I64, 10))
    own_scales = simd.place(b, scales, block, SCALE_BYTES[FACTORED])
    factor, addend = (in_both_halves(b, simd.offset(b, own_scales, at)) for at in (0, PACKED_ADDEND_AT))
    shift = b.or_(bits(3, 8), bits(7, 4))
    bytes_at = b.add(simd.place(b, panel, block, BLOCK_BYTES[FACTORED]), bits(1, 3 * 64))
    return _whole_pairs(b, bytes_at, shift, 0x000F000F, factor, addend)


def _sums(builder: Builder, partial: Any, count: int) -> list[Any]:
    """What the bytes of `count` rows gave."""
    places = [simd.offset(builder, partial, 64 * r) for r in range(count)]
    return [cgutils.alloca_once_value(builder, simd.load(builder, place, I32_LANES, 64)) for place in places]


def _store(builder: Builder, accs: list[Any], panel: Any, num_blocks: Any, ends: list[Any]) -> None:
    """Rows' sums, scaled, to where they go; `ends`: their scales, where that is, how far apart, whether to add."""
    b, (scales, out, out_stride, add) = builder, ends
    row_scale = simd.place(b, panel, num_blocks, BLOCK_BYTES[FACTORED] + SCALE_BYTES[FACTORED])
    for r, acc in enumerate(accs):
        target = b.add(out, b.mul(out_stride, ir.Constant(I64, r)))
        scale_and_store(b, FACTORED, b.load(acc), row_scale, simd.offset(b, scales, 4 * r), target, add)


@intrinsic
def _finish_sharing(
    context: Any, form: Any, rows: Any, partial: Any, lines: Any, panel: Any, num_blocks: Any, shared: Any,
    listed: Any, scales: Any, out: Any, out_stride: Any, add: Any,
) -> Any:  # fmt: skip
    """The sums of one or two rows that share a list and their outliers times a panel, scaled, to `out`.

    The panel is packed (`form` PACKED); `lines`: the same as `unpack` leaves it (UNPACKED). `listed`: where the number
    of entries lies.
    """
    kind, count, pairs = form.literal_value, rows.literal_value, PAIRS["avx2"]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, partial_, lines_, panel_, blocks_, shared_, listed_, *ends = args
        accs = _sums(b, partial_, count)
        factors = (
            after_integers(b, lines_, blocks_)
            if kind == UNPACKED
            else simd.place(b, panel_, blocks_, BLOCK_BYTES[FACTORED])
        )
        with cgutils.for_range(b, _field(b, listed_, 0)) as loop:
            entry = simd.place(b, shared_, loop.index, SHARED_ENTRY_BYTES)
            if kind == UNPACKED:
                weights = _pairs_of_unpacked(b, entry, lines_, factors)
            else:
                weights = _pairs_of_packed(b, entry, panel_, factors)
            for r, acc in enumerate(accs):
                values = simd.splat_word(b, simd.offset(b, entry, PAIR + 4 * r))
                b.store(pairs(b, b.load(acc), weights, values), acc)
        _store(b, accs, panel_, blocks_, ends)
        return c.get_dummy_value()

    return types.none(form, rows, *[types.int64] * 10), codegen


@intrinsic
def _finish_rows(
    context: Any, rows: Any, partial: Any, lines: Any, panel: Any, num_blocks: Any, lists: Any, ahead: Any,
    listed: Any, scales: Any, out: Any, out_stride: Any, add: Any,
) -> Any:  # fmt: skip
    """The same of `rows` rows that have a list each, all as long; `lines`: the panel as `shorts.expand` leaves it. The
    beginnings of the next rows' lists, which lie `ahead` of theirs, are fetched, and where the rows after those go."""
    count, pairs = rows.literal_value, PAIRS["avx2"]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        simd.align_frame(b)
        _, partial_, lines_, panel_, blocks_, lists_, ahead_, listed_, *ends = args
        accs = _sums(b, partial_, count)
        next_lists, (_, out_, out_stride_, _) = b.add(lists_, ahead_), ends
        for row in range(4):
            simd.prefetch(b, simd.offset(b, next_lists, OCTET_ROW_BYTES * row), cache=1)
            simd.prefetch(b, b.add(out_, b.mul(out_stride_, ir.Constant(I64, RESULTS_AHEAD + row))), cache=1)
        with cgutils.for_range(b, _field(b, listed_, 0)) as loop:
            line, place = (
                operation(loop.index, ir.Constant(I64, ENTRIES_OF_LINE)) for operation in (b.udiv, b.urem)
            )
            first = simd.place(b, simd.place(b, lists_, line, OCTET_STEP_BYTES), place, ENTRY_BYTES)
            for r, acc in enumerate(accs):
                entry = simd.offset(b, first, OCTET_ROW_BYTES * r)
                weights = simd.load(b, b.add(lines_, _field(b, entry, 0)), I32_LANES, 64)
                values = simd.splat_word(b, simd.offset(b, entry, 4))
                b.store(pairs(b, b.load(acc), weights, values), acc)
        _store(b, accs, panel_, blocks_, ends)
        return c.get_dummy_value()

    return types.none(rows, *[types.int64] * 11), codegen


@inline
def finish_sharing(
    form: int, first: int, last: int, lines: int, panel: int, num_blocks: int, x: int, sums: int, scales: int,
    out: int, out_stride: int, add: int, partial: int,
) -> None:  # fmt: skip
    """`_finish_sharing` for rows first..last, whose sums lie at `partial`; `first` is a multiple of 16."""
    for row in range(first, last, SHARING_ROWS):
        a, p = x + shared_list_place(row, num_blocks), partial + (row - first) * 64
        n, f, o = sums + listed_place(row, num_blocks), scales + row * 4, out + row * out_stride
        if row + 1 < last:
            _finish_sharing(form, 2, p, lines, panel, num_blocks, a, n, f, o, out_stride, add)
        else:
            _finish_sharing(form, 1, p, lines, panel, num_blocks, a, n, f, o, out_stride, add)


@inline
def finish(
    first: int, last: int, lines: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, partial: int,
) -> None:  # fmt: skip
    """`_finish_rows` for rows first..last, whose sums lie at `partial`; `first` is a multiple of 16."""
    row = first
    while row < last:
        a, p = x + list_place(row, num_blocks), partial + (row - first) * 64
        n, f, o = sums + listed_place(row, num_blocks), scales + row * 4, out + row * out_stride
        ahead = list_place(row + 4, num_blocks) - list_place(row, num_blocks)
        if row + 4 <= last:
            _finish_rows(4, p, lines, panel, num_blocks, a, ahead, n, f, o, out_stride, add)
            row += 4
        elif row + 2 <= last:
            _finish_rows(2, p, lines, panel, num_blocks, a, ahead, n, f, o, out_stride, add)
            row += 2
        else:
            _finish_rows(1, p, lines, panel, num_blocks, a, ahead, n, f, o, out_stride, add)
            row += 1
