"""A row's outliers times a panel of 4-bit weights, one by one, on top of what its bytes gave: the end of a product."""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.matmul import PAIRS, scale_and_store
from engine.kernels.octet_panels import (
    ADDEND_AT,
    EXPANDED,
    FACTOR_BYTES,
    PACKED_ADDEND_AT,
    UNPACKED,
    after_integers,
    in_both_halves,
)
from engine.kernels.packing import BLOCK_BYTES, FACTORED, SCALE_BYTES
from engine.kernels.quantised import (
    ENTRIES_OF_LINE,
    ENTRY_BYTES,
    NUM_LISTED,
    OCTET_ROW_BYTES,
    OCTET_STEP_BYTES,
    SUM_BYTES,
    TILE_SUMS_BYTES,
    list_place,
    sums_place,
)
from engine.kernels.simd import I16, I32, I32_LANES, I64, LANES

Builder = Any
SHORT_LANES = ir.VectorType(I16, 2 * LANES)


def _pairs_of_line(builder: Builder, line_at: Any, ready: Any, panel: Any, scales: Any) -> Any:
    """D · q + M of two inputs as pairs, see `shorts.expand`, from a panel that was unpacked to `ready`, or packed.

    `line_at`: where its line would lie among expanded ones."""
    b = builder

    def bits(shift: int, mask: int) -> Any:
        return b.and_(b.lshr(line_at, ir.Constant(I64, shift)), ir.Constant(I64, mask))

    # A block has 16 lines: two of each of its 8 groups, inputs 0 and 2 of the group, then 1 and 3.
    block, shift = bits(10, 0x7FF), bits(3, 8)
    if ready is not None:
        factors_at = simd.place(b, ready[1], block, FACTOR_BYTES)
        factor, addend = (
            simd.load(b, simd.offset(b, factors_at, at), I32_LANES, 64) for at in (0, ADDEND_AT)
        )
        at, mask = b.add(ready[0], bits(1, ~63)), 0x00FF00FF
    else:
        own_scales = simd.place(b, scales, block, SCALE_BYTES[FACTORED])
        factor, addend = (in_both_halves(b, simd.offset(b, own_scales, at)) for at in (0, PACKED_ADDEND_AT))
        # Group g + 4 is the high halves of group g's bytes.
        shift = b.or_(shift, bits(7, 4))
        base = simd.place(b, panel, block, BLOCK_BYTES[FACTORED])
        at, mask = b.add(base, bits(1, 3 * 64)), 0x000F000F
    bytes_ = simd.load(b, at, I32_LANES, 64)
    moved = b.lshr(bytes_, simd.splat(b, b.trunc(shift, I32), I32_LANES))
    q, factor, addend = (
        b.bitcast(value, SHORT_LANES)
        for value in (b.and_(moved, ir.Constant(I32_LANES, [mask] * LANES)), factor, addend)
    )
    return b.bitcast(b.add(b.mul(q, factor), addend), I32_LANES)


@intrinsic
def _finish_rows(
    context: Any, form: Any, rows: Any, partial: Any, lines: Any, panel: Any, num_blocks: Any, lists: Any,
    listed: Any, scales: Any, out: Any, out_stride: Any, add: Any,
) -> Any:  # fmt: skip
    """The sums of `rows` rows and their outliers times a panel, scaled, to `out`.

    The panel is packed; `lines`: the same as `_unpack` (`form` UNPACKED) or `shorts.expand` (EXPANDED) leaves it.
    `listed`: where the numbers of outliers lie.
    """
    kind, count, pairs = form.literal_value, rows.literal_value, PAIRS["avx2"]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        simd.align_frame(b)
        _, _, partial_, lines_, panel_, blocks_, lists_, listed_, factors_, out_, out_stride_, add_ = args
        scales_ = simd.place(b, panel_, blocks_, BLOCK_BYTES[FACTORED])
        accs = [
            cgutils.alloca_once_value(b, simd.load(b, simd.offset(b, partial_, 64 * r), I32_LANES, 64))
            for r in range(count)
        ]
        numbers = [
            b.zext(simd.load(b, simd.offset(b, listed_, SUM_BYTES * r), I32, 4), I64) for r in range(count)
        ]
        most = numbers[0]
        for number in numbers[1:]:
            most = b.select(b.icmp_unsigned(">", number, most), number, most)
        # The rows' lists side by side, nothing after the end of the shorter: a loop that ends is dear.
        nothing = b.ptrtoint(cgutils.alloca_once_value(b, ir.Constant(I64, 0)), I64)
        with cgutils.for_range(b, most) as loop:
            line, place = (
                operation(loop.index, ir.Constant(I64, ENTRIES_OF_LINE)) for operation in (b.udiv, b.urem)
            )
            first = simd.place(b, simd.place(b, lists_, line, OCTET_STEP_BYTES), place, ENTRY_BYTES)
            for r, acc in enumerate(accs):
                entry = simd.offset(b, first, OCTET_ROW_BYTES * r)
                if count > 1:
                    entry = b.select(b.icmp_unsigned("<", loop.index, numbers[r]), entry, nothing)
                line_at = b.zext(simd.load(b, entry, I32, 4), I64)
                if kind == EXPANDED:
                    weights = simd.load(b, b.add(lines_, line_at), I32_LANES, 64)
                else:
                    ready = (lines_, after_integers(b, lines_, blocks_)) if kind == UNPACKED else None
                    weights = _pairs_of_line(b, line_at, ready, panel_, scales_)
                values = simd.splat_word(b, simd.offset(b, entry, 4))
                b.store(pairs(b, b.load(acc), weights, values), acc)
        row_scale = simd.place(b, scales_, blocks_, SCALE_BYTES[FACTORED])
        for r, acc in enumerate(accs):
            target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
            scale_and_store(
                b, FACTORED, b.load(acc), row_scale, simd.offset(b, factors_, 4 * r), target, add_
            )
        return c.get_dummy_value()

    return types.none(form, rows, *[types.int64] * 10), codegen


@inline
def finish(
    form: int, first: int, last: int, lines: int, panel: int, num_blocks: int, x: int, sums: int, scales: int,
    out: int, out_stride: int, add: int, partial: int,
) -> None:  # fmt: skip
    """`_finish_rows` for rows first..last, whose sums lie at `partial`; `first` is a multiple of 16."""
    row = first
    while row < last:
        a, p = x + list_place(row, num_blocks), partial + (row - first) * 64
        n = sums + sums_place(row, num_blocks) + (num_blocks - 1) * TILE_SUMS_BYTES + NUM_LISTED
        f, o = scales + row * 4, out + row * out_stride
        if row + 4 <= last:
            _finish_rows(form, 4, p, lines, panel, num_blocks, a, n, f, o, out_stride, add)
            row += 4
        elif row + 2 <= last:
            _finish_rows(form, 2, p, lines, panel, num_blocks, a, n, f, o, out_stride, add)
            row += 2
        else:
            _finish_rows(form, 1, p, lines, panel, num_blocks, a, n, f, o, out_stride, add)
            row += 1
