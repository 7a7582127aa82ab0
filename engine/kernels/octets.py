"""Products of 4-bit weights with signed bytes, two to a lane of 16 bits: machines without a dot product of four bytes.

The products of a block fit their lanes, 8 · 2 · 15 · 127 < 2^15, and are then scaled by D; M times the sum of the block
comes on top, for two blocks at once. A row's outliers, which are 0 among the bytes, follow one by one, each times
D · q + M of its input. The integers are those of `matmul.py`.
"""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from engine.kernels import shorts, simd
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.matmul import PAIRS, fetch_ahead, scale_and_store, unpack_ir
from engine.kernels.packing import BLOCK_BYTES, FACTORED, ROW_SCALE_BYTES, SCALE_BYTES
from engine.kernels.quantised import (
    ENTRIES_OF_LINE,
    ENTRY_BYTES,
    MANY_ROWS,
    NUM_LISTED,
    OCTET_ROW_BYTES,
    OCTET_STEP_BYTES,
    OCTETS,
    SUM_BYTES,
    SUM_WORD,
    TILE_SUMS_BYTES,
    block_of_rows,
    list_place,
    octets_place,
    sums_place,
)
from engine.kernels.shorts import EXPANDED_BYTES, PARTIAL_BYTES
from engine.kernels.simd import I8, I16, I32, I32_LANES, I64, LANES

Builder = Any
SHORT_LANES = ir.VectorType(I16, 2 * LANES)
PACKED, UNPACKED, EXPANDED = range(3)
"""Forms of a panel: as it is stored, its integers as bytes, whole weights D · q + M as pairs."""
BYTES_BYTES = 8 * 64
"""One block of an unpacked panel: its integers as bytes."""
FACTOR_BYTES = 3 * 64
"""What scales one, behind the integers of all: D and M, each in both halves of 32 bits; with the first of two blocks
both their M side by side."""
ADDEND_AT, ADDENDS_AT = 64, 128
"""Where M, and both M, lie there."""
PACKED_ADDEND_AT = 32
"""Where the 16 M of a packed block's scales begin."""
MAX_STEPS = 9
"""Steps whose weights and rows stay in the first cache, for every second step of a row falls on the same lines of it.
"""
ROWS_TO_EXPAND_FOR = 48
"""From so many rows on it pays to make weights whole for outliers."""


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply` for one thread."""
    return PARTIAL_BYTES + -(-num_inputs // 64) * 2 * (BYTES_BYTES + FACTOR_BYTES + EXPANDED_BYTES)


def bytes_products(builder: Builder, unsigned: Any, signed: Any) -> Any:
    """Products of 64 bytes each, two added to a lane of 16 bits."""
    parts, bytes64 = [], ir.VectorType(I8, 4 * LANES)
    args = [builder.bitcast(value, bytes64) for value in (unsigned, signed)]
    for start in (0, 32):
        order = ir.Constant(ir.VectorType(I32, 32), list(range(start, start + 32)))
        halves = [builder.shuffle_vector(value, value, order) for value in args]
        parts.append(simd.call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), halves))
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _fetch_next_rows(builder: Builder, rows: Any) -> None:
    """Fetch a step's octets of the four rows that come next in a tile."""
    for row in range(4, 8):
        simd.prefetch(builder, simd.offset(builder, rows, OCTET_ROW_BYTES * row), cache=1)


def _place(builder: Builder, base: Any, index: Any, num_bytes: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(I64, num_bytes)))


def _splat_word(builder: Builder, address: Any) -> Any:
    return simd.splat(builder, simd.load(builder, address, I32, 4), I32_LANES)


def _widened(builder: Builder, scales: Any) -> Any:
    """16 integers of 16 bits, each in the low half of 32 bits."""
    return builder.zext(simd.load(builder, scales, ir.VectorType(I16, LANES), 32), I32_LANES)


def _joined(builder: Builder, low: Any, high: Any) -> Any:
    """Two of those as pairs."""
    return builder.or_(low, builder.shl(high, ir.Constant(I32_LANES, [16] * LANES)))


def _in_both_halves(builder: Builder, scales: Any) -> Any:
    wide = _widened(builder, scales)
    return _joined(builder, wide, wide)


def _packed_lines(builder: Builder, panel: Any, scales: Any, block: Any) -> Iterator[Any]:
    """The integers of a block of a panel as it is stored, 8 lines of bytes, then D in both halves from its `scales`."""
    yield from unpack_ir(builder, FACTORED, _place(builder, panel, block, BLOCK_BYTES[FACTORED]))
    yield _in_both_halves(builder, scales)


def _line(builder: Builder, address: Any) -> Any:
    return simd.load(builder, address, I32_LANES, 64)


def _ready_lines(builder: Builder, integers: Any, factors: Any) -> Iterator[Any]:
    """The same of a block that was unpacked, each line loaded when it is asked for: registers are few."""
    for line in range(8):
        yield _line(builder, simd.offset(builder, integers, 64 * line))
    yield _line(builder, factors)


def _after_integers(builder: Builder, unpacked: Any, num_blocks: Any) -> Any:
    """Where the factors of a panel lie that was unpacked there."""
    one = ir.Constant(I64, 1)
    return _place(builder, unpacked, builder.lshr(builder.add(num_blocks, one), one), 2 * BYTES_BYTES)


@intrinsic
def _unpack(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel's integers as bytes, then its factors; what is left over of the last step of two blocks is zero."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scales, factors = (
            _place(b, panel_, blocks_, BLOCK_BYTES[FACTORED]),
            _after_integers(b, target_, blocks_),
        )
        one = ir.Constant(I64, 1)
        with cgutils.for_range(b, blocks_) as loop:
            scales_at = _place(b, scales, loop.index, SCALE_BYTES[FACTORED])
            integers_to, factors_to = (
                _place(b, base, loop.index, num_bytes)
                for base, num_bytes in ((target_, BYTES_BYTES), (factors, FACTOR_BYTES))
            )
            for line, value in enumerate(_packed_lines(b, panel_, scales_at, loop.index)):
                to = simd.offset(b, integers_to, 64 * line) if line < 8 else factors_to
                simd.store(b, value, to, 64)
            addend = _in_both_halves(b, simd.offset(b, scales_at, PACKED_ADDEND_AT))
            simd.store(b, addend, simd.offset(b, factors_to, ADDEND_AT), 64)
        with b.if_then(b.trunc(blocks_, ir.IntType(1))):
            for base, num_bytes in ((target_, BYTES_BYTES), (factors, FACTOR_BYTES)):
                for at in range(0, num_bytes, 64):
                    to = simd.offset(b, _place(b, base, blocks_, num_bytes), at)
                    simd.store(b, ir.Constant(I32_LANES, [0] * LANES), to, 64)
        with cgutils.for_range(b, b.lshr(b.add(blocks_, one), one)) as loop:
            step = _place(b, factors, loop.index, 2 * FACTOR_BYTES)
            low, high = (
                _line(b, simd.offset(b, step, FACTOR_BYTES * index + ADDEND_AT)) for index in range(2)
            )
            low = b.and_(low, ir.Constant(I32_LANES, [0xFFFF] * LANES))
            simd.store(b, _joined(b, low, high), simd.offset(b, step, ADDENDS_AT), 64)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@intrinsic
def _multiply_steps(
    context: Any, form: Any, joined: Any, rows: Any, weights: Any, factors: Any, following: Any, num_blocks: Any,
    x: Any, sums: Any, partial: Any,
) -> Any:  # fmt: skip
    """`rows` rows without outliers times some blocks of a panel into `partial` [row][16 outputs], added to what is
    there when `joined`.

    `weights` and their `factors` as `_unpack` leaves them; or packed, and their scales. `following`: the same stretch
    of the next panel, packed."""
    kind, with_partial, count = form.literal_value, joined.literal_value, rows.literal_value
    pairs = PAIRS["avx2"]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, weights_, factors_, following_, blocks_, x_, sums_, partial_ = args
        simd.align_frame(b)
        accs = [cgutils.alloca_once(b, I32_LANES) for _ in range(count)]
        for r, acc in enumerate(accs):
            b.store(ir.Constant(I32_LANES, [0] * LANES), acc)
            if with_partial:
                b.store(simd.load(b, simd.offset(b, partial_, 64 * r), I32_LANES, 64), acc)

        def multiply(rows_at: Any, lines: Any) -> None:
            """A block, whose rows begin at `rows_at`; `lines`: its integers as 8 lines of bytes, then D."""
            parts: list[Any] = [None] * count
            for group, line in zip(range(8), lines, strict=False):
                for r in range(count):
                    quad = _splat_word(b, simd.offset(b, rows_at, OCTET_ROW_BYTES * r + 4 * group))
                    product = bytes_products(b, line, quad)
                    parts[r] = b.add(parts[r], product) if group else product
            (factor,) = lines
            for acc, part in zip(accs, parts, strict=True):
                b.store(pairs(b, b.load(acc), b.bitcast(part, I32_LANES), factor), acc)

        def add_totals(totals_at: Any, kind_of_total: Any, addends: Any) -> None:
            """M times the rows' sums, one of 16 bits or those of two blocks."""
            for r, acc in enumerate(accs):
                total = simd.load(b, simd.offset(b, totals_at, SUM_BYTES * r + SUM_WORD), kind_of_total, 2)
                both = simd.splat(
                    b, total, ir.VectorType(kind_of_total, 4 * LANES * 8 // kind_of_total.width)
                )
                b.store(pairs(b, b.load(acc), b.bitcast(both, I32_LANES), addends), acc)

        one = ir.Constant(I64, 1)
        if kind == UNPACKED:
            with cgutils.for_range(b, b.lshr(b.add(blocks_, one), one)) as loop:
                # Here, while there is much to compute: to unpack is only to read.
                fetch_ahead(b, FACTORED, following_, b.shl(loop.index, one), 0, 2)
                rows_at, weights_at, factors_at, totals_at = (
                    _place(b, base, loop.index, 2 * num_bytes)
                    for base, num_bytes in (
                        (x_, OCTET_STEP_BYTES // 2),
                        (weights_, BYTES_BYTES),
                        (factors_, FACTOR_BYTES),
                        (sums_, TILE_SUMS_BYTES),
                    )
                )
                _fetch_next_rows(b, rows_at)
                for index in range(2):
                    here = simd.offset(b, weights_at, BYTES_BYTES * index)
                    ready = _ready_lines(b, here, simd.offset(b, factors_at, FACTOR_BYTES * index))
                    multiply(simd.offset(b, rows_at, 32 * index), ready)
                add_totals(totals_at, I32, _line(b, simd.offset(b, factors_at, ADDENDS_AT)))
        else:
            with cgutils.for_range(b, blocks_) as loop:
                fetch_ahead(b, FACTORED, weights_, loop.index)
                scales_at = _place(b, factors_, loop.index, SCALE_BYTES[FACTORED])
                multiply(
                    block_of_rows(b, OCTETS, x_, loop.index),
                    _packed_lines(b, weights_, scales_at, loop.index),
                )
                totals_at = _place(b, sums_, b.lshr(loop.index, one), 2 * TILE_SUMS_BYTES)
                totals_at = b.add(totals_at, b.shl(b.and_(loop.index, one), one))
                add_totals(totals_at, I16, _widened(b, simd.offset(b, scales_at, PACKED_ADDEND_AT)))
        for r, acc in enumerate(accs):
            simd.store(b, b.load(acc), simd.offset(b, partial_, 64 * r), 64)
        return c.get_dummy_value()

    return types.none(form, joined, rows, *[types.int64] * 7), codegen


def _pairs_of_line(builder: Builder, line_at: Any, ready: Any, panel: Any, scales: Any) -> Any:
    """D · q + M of two inputs as pairs, see `shorts.expand`, from a panel that was unpacked to `ready`, or packed.

    `line_at`: where its line would lie among expanded ones."""
    b = builder

    def bits(shift: int, mask: int) -> Any:
        return b.and_(b.lshr(line_at, ir.Constant(I64, shift)), ir.Constant(I64, mask))

    # A block has 16 lines: two of each of its 8 groups, inputs 0 and 2 of the group, then 1 and 3.
    block, shift = bits(10, 0x7FF), bits(3, 8)
    if ready is not None:
        factors_at = _place(b, ready[1], block, FACTOR_BYTES)
        factor, addend = (
            simd.load(b, simd.offset(b, factors_at, at), I32_LANES, 64) for at in (0, ADDEND_AT)
        )
        at, mask = b.add(ready[0], bits(1, ~63)), 0x00FF00FF
    else:
        own_scales = _place(b, scales, block, SCALE_BYTES[FACTORED])
        factor, addend = (_in_both_halves(b, simd.offset(b, own_scales, at)) for at in (0, PACKED_ADDEND_AT))
        # Group g + 4 is the high halves of group g's bytes.
        shift = b.or_(shift, bits(7, 4))
        base = _place(b, panel, block, BLOCK_BYTES[FACTORED])
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
        scales_ = _place(b, panel_, blocks_, BLOCK_BYTES[FACTORED])
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
            first = _place(b, _place(b, lists_, line, OCTET_STEP_BYTES), place, ENTRY_BYTES)
            for r, acc in enumerate(accs):
                entry = simd.offset(b, first, OCTET_ROW_BYTES * r)
                if count > 1:
                    entry = b.select(b.icmp_unsigned("<", loop.index, numbers[r]), entry, nothing)
                line_at = b.zext(simd.load(b, entry, I32, 4), I64)
                if kind == EXPANDED:
                    weights = simd.load(b, b.add(lines_, line_at), I32_LANES, 64)
                else:
                    ready = (lines_, _after_integers(b, lines_, blocks_)) if kind == UNPACKED else None
                    weights = _pairs_of_line(b, line_at, ready, panel_, scales_)
                values = _splat_word(b, simd.offset(b, entry, 4))
                b.store(pairs(b, b.load(acc), weights, values), acc)
        row_scale = _place(b, scales_, blocks_, SCALE_BYTES[FACTORED])
        for r, acc in enumerate(accs):
            target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
            scale_and_store(
                b, FACTORED, b.load(acc), row_scale, simd.offset(b, factors_, 4 * r), target, add_
            )
        return c.get_dummy_value()

    return types.none(form, rows, *[types.int64] * 10), codegen


@inline
def _rows_by_steps(
    form: int, joined: int, first: int, last: int, weights: int, factors: int, following: int, count: int,
    num_blocks: int, x: int, sums: int, partial: int,
) -> None:  # fmt: skip
    row = first
    while row < last:
        # Groups of 4, 2 and 1 from a multiple of 16 on: a group never straddles two tiles of rows.
        a, s, p = (
            x + octets_place(row, num_blocks),
            sums + sums_place(row, num_blocks),
            partial + (row - first) * 64,
        )
        if row + 4 <= last:
            _multiply_steps(form, joined, 4, weights, factors, following, count, a, s, p)
            row += 4
        elif row + 3 <= last:
            _multiply_steps(form, joined, 3, weights, factors, following, count, a, s, p)
            row += 3
        elif row + 2 <= last:
            _multiply_steps(form, joined, 2, weights, factors, following, count, a, s, p)
            row += 2
        else:
            _multiply_steps(form, joined, 1, weights, factors, following, count, a, s, p)
            row += 1


@inline
def _finish(
    form: int, first: int, last: int, lines: int, panel: int, num_blocks: int, x: int, sums: int, scales: int,
    out: int, out_stride: int, add: int, partial: int,
) -> None:  # fmt: skip
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


@inline
def multiply(
    first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int, out_stride: int,
    add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` with at most MAX_ROWS rows that lie as octets times a panel of 4-bit weights."""
    unpacked, partial, steps = scratch + PARTIAL_BYTES, scratch, (num_blocks + 1) // 2
    factors, panel_scales = unpacked + steps * 2 * BYTES_BYTES, panel + num_blocks * BLOCK_BYTES[FACTORED]
    if last - first < MANY_ROWS:
        _rows_by_steps(
            PACKED, 0, first, last, panel, panel_scales, 0, num_blocks, num_blocks, x, sums, partial
        )
        _finish(PACKED, first, last, 0, panel, num_blocks, x, sums, scales, out, out_stride, add, partial)
        return
    _unpack(panel, num_blocks, unpacked)
    next_panel = panel_scales + num_blocks * SCALE_BYTES[FACTORED] + ROW_SCALE_BYTES[FACTORED]
    stretches = -(-steps // MAX_STEPS)
    each = -(-steps // stretches)
    for begin in range(0, steps, each):
        count = 2 * min(each, steps - begin)
        following = next_panel + 2 * begin * (BLOCK_BYTES[FACTORED] + SCALE_BYTES[FACTORED])
        w, f = unpacked + begin * 2 * BYTES_BYTES, factors + begin * 2 * FACTOR_BYTES
        a, s = x + begin * OCTET_STEP_BYTES, sums + 2 * begin * TILE_SUMS_BYTES
        if begin == 0:
            _rows_by_steps(UNPACKED, 0, first, last, w, f, following, count, num_blocks, a, s, partial)
        else:
            _rows_by_steps(UNPACKED, 1, first, last, w, f, following, count, num_blocks, a, s, partial)
    if last - first < ROWS_TO_EXPAND_FOR:
        _finish(
            UNPACKED, first, last, unpacked, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
    else:
        lines = factors + steps * 2 * FACTOR_BYTES
        shorts.expand(0, panel, num_blocks, lines)
        _finish(
            EXPANDED, first, last, lines, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
