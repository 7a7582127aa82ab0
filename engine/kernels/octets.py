"""Products of 4-bit weights with signed bytes, two to a lane of 16 bits: machines without a dot product of four bytes.

The products of a block fit their lanes, 8 · 2 · 15 · 127 < 2^15, and are then scaled by D; M times the sum of the block
comes on top, for two blocks at once. A row's outliers, which are 0 among the bytes, follow one by one, each times
D · q + M of its input. The integers are those of `matmul.py`.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import avx2, outliers, shorts, simd
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.matmul import PAIRS, fetch_ahead
from engine.kernels.octet_panels import (
    ADDENDS_AT,
    PACKED,
    PACKED_ADDEND_AT,
    UNPACKED,
    load_line,
    packed_lines,
    ready_lines,
    unpack,
    unpacked_bytes,
    widened,
)
from engine.kernels.outlier_lists import BYTES_BYTES, FACTOR_BYTES, LISTED_APART_FROM
from engine.kernels.packing import BLOCK_BYTES, FACTORED, ROW_SCALE_BYTES, SCALE_BYTES
from engine.kernels.quantised import (
    MANY_ROWS,
    OCTET_ROW_BYTES,
    OCTET_STEP_BYTES,
    OCTETS,
    SUM_BYTES,
    SUM_WORD,
    TILE_SUMS_BYTES,
    block_of_rows,
    octets_place,
    sums_place,
)
from engine.kernels.shorts import EXPANDED_BYTES, PARTIAL_BYTES, SHORT_LANES
from engine.kernels.simd import I16, I32, I32_LANES, I64, LANES

Builder = Any
PACKED_STEP_BYTES = 2 * (BLOCK_BYTES[FACTORED] + SCALE_BYTES[FACTORED])
LINES_OF_STEP = PACKED_STEP_BYTES // 64
"""Two blocks of a panel as it is stored."""
MAX_STEPS = 9
"""Steps whose weights and rows stay in the first cache, for every second step of a row falls on the same lines of it.
"""


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply` for one thread."""
    return PARTIAL_BYTES + max(unpacked_bytes(num_inputs), -(-num_inputs // 64) * 2 * EXPANDED_BYTES)


def _fetch_rows(builder: Builder, rows: Any) -> None:
    """Fetch a step's octets of four rows into the first cache."""
    for row in range(4):
        simd.prefetch(builder, simd.offset(builder, rows, OCTET_ROW_BYTES * row), cache=1)


@intrinsic
def _multiply_steps(
    context: Any, form: Any, joined: Any, rows: Any, weights: Any, factors: Any, following: Any, num_lines: Any,
    num_blocks: Any, x: Any, ahead: Any, sums: Any, ahead_sums: Any, partial: Any,
) -> Any:  # fmt: skip
    """`rows` rows without outliers times some blocks of a panel into `partial` [row][16 outputs], added to what is
    there when `joined`.

    `weights` and their `factors` as `unpack` leaves them; or packed, and their scales. `following`: of the same stretch
    of the next panel, packed, these rows' share, `num_lines` of each step; `ahead`, `ahead_sums`: how far on the next
    rows lie, and their sums. Those are fetched while unpacked weights are multiplied."""
    kind, with_partial, count = form.literal_value, joined.literal_value, rows.literal_value
    pairs = PAIRS["avx2"]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, weights_, factors_, following_, lines_, blocks_, x_, ahead_, sums_, ahead_sums_, partial_ = (
            args
        )
        simd.align_frame(b)
        accs = [cgutils.alloca_once(b, I32_LANES) for _ in range(count)]
        for r, acc in enumerate(accs):
            b.store(ir.Constant(I32_LANES, [0] * LANES), acc)
            if with_partial:
                b.store(simd.load(b, simd.offset(b, partial_, 64 * r), I32_LANES, 64), acc)

        def multiply(rows_at: Any, lines: Any) -> None:
            """A block, whose rows begin at `rows_at`; `lines`: its integers as 8 lines of bytes, then D."""
            parts: list[Any] = [None] * count
            for group, weights in zip(range(8), lines, strict=False):
                for r in range(count):
                    quad = simd.splat_word(b, simd.offset(b, rows_at, OCTET_ROW_BYTES * r + 4 * group))
                    products = b.bitcast(avx2.byte_products(b, weights, quad), SHORT_LANES)
                    parts[r] = b.add(parts[r], products) if group else products
                    if group and count >= avx2.PINNED_ROWS:
                        parts[r] = avx2.pinned(b, parts[r])
            (factor,) = lines
            for acc, part in zip(accs, parts, strict=True):
                b.store(pairs(b, b.load(acc), b.bitcast(part, I32_LANES), factor), acc)

        def add_totals(totals_at: Any, kind_of_total: Any, addends: Any) -> None:
            """M times the rows' sums, one of 16 bits or those of two blocks."""
            for r, acc in enumerate(accs):
                total = simd.load(b, simd.offset(b, totals_at, SUM_BYTES * r + SUM_WORD), kind_of_total, 2)
                lanes = ir.VectorType(kind_of_total, I32.width * LANES // kind_of_total.width)
                totals = b.bitcast(simd.splat(b, total, lanes), I32_LANES)
                b.store(pairs(b, b.load(acc), totals, addends), acc)

        one = ir.Constant(I64, 1)
        if kind == UNPACKED:
            with cgutils.for_range(b, b.lshr(b.add(blocks_, one), one)) as loop:
                # Here, while there is much to compute: to unpack is only to read.
                following_step = simd.place(b, following_, loop.index, PACKED_STEP_BYTES)
                with cgutils.for_range(b, lines_) as line:
                    simd.prefetch(b, simd.place(b, following_step, line.index, 64))
                rows_at, weights_at, factors_at, totals_at = (
                    simd.place(b, base, loop.index, num_bytes)
                    for base, num_bytes in (
                        (x_, OCTET_STEP_BYTES),
                        (weights_, 2 * BYTES_BYTES),
                        (factors_, 2 * FACTOR_BYTES),
                        (sums_, 2 * TILE_SUMS_BYTES),
                    )
                )
                _fetch_rows(b, b.add(rows_at, ahead_))
                simd.prefetch(b, b.add(totals_at, ahead_sums_), cache=1)
                for index in range(2):
                    here = simd.offset(b, weights_at, BYTES_BYTES * index)
                    ready = ready_lines(b, here, simd.offset(b, factors_at, FACTOR_BYTES * index))
                    multiply(simd.offset(b, rows_at, 32 * index), ready)
                add_totals(totals_at, I32, load_line(b, simd.offset(b, factors_at, ADDENDS_AT)))
        else:
            with cgutils.for_range(b, blocks_) as loop:
                fetch_ahead(b, FACTORED, weights_, loop.index)
                scales_at = simd.place(b, factors_, loop.index, SCALE_BYTES[FACTORED])
                multiply(
                    block_of_rows(b, OCTETS, x_, loop.index),
                    packed_lines(b, weights_, scales_at, loop.index),
                )
                totals_at = simd.place(b, sums_, b.lshr(loop.index, one), 2 * TILE_SUMS_BYTES)
                totals_at = b.add(totals_at, b.shl(b.and_(loop.index, one), one))
                add_totals(totals_at, I16, widened(b, simd.offset(b, scales_at, PACKED_ADDEND_AT)))
        for r, acc in enumerate(accs):
            simd.store(b, b.load(acc), simd.offset(b, partial_, 64 * r), 64)
        return c.get_dummy_value()

    return types.none(form, joined, rows, *[types.int64] * 10), codegen


@inline
def _rows_by_steps(
    form: int, joined: int, first: int, last: int, weights: int, factors: int, following: int, count: int,
    num_blocks: int, x: int, sums: int, partial: int,
) -> None:  # fmt: skip
    # The first half of the rows fetch the next panel, a share each: that is soon enough, and once.
    lines_each = -(-LINES_OF_STEP * 8 // (last - first))
    row, fetched = first, 0
    while row < last:
        num_lines = min(lines_each, LINES_OF_STEP - fetched)
        share = following + fetched * 64
        fetched += num_lines
        # Groups of 4, 2 and 1 from a multiple of 16 on: a group never straddles two tiles of rows.
        a, s, p = (
            x + octets_place(row, num_blocks),
            sums + sums_place(row, num_blocks),
            partial + (row - first) * 64,
        )
        # The next rows lie behind these, or in the next tile.
        next_rows = octets_place(row + 4, num_blocks) - octets_place(row, num_blocks)
        next_sums = sums_place(row + 4, num_blocks) - sums_place(row, num_blocks)
        if row + 4 <= last:
            _multiply_steps(
                form, joined, 4, weights, factors, share, num_lines, count, a, next_rows, s, next_sums, p
            )
            row += 4
        elif row + 3 <= last:
            _multiply_steps(
                form, joined, 3, weights, factors, share, num_lines, count, a, next_rows, s, next_sums, p
            )
            row += 3
        elif row + 2 <= last:
            _multiply_steps(
                form, joined, 2, weights, factors, share, num_lines, count, a, next_rows, s, next_sums, p
            )
            row += 2
        else:
            _multiply_steps(
                form, joined, 1, weights, factors, share, num_lines, count, a, next_rows, s, next_sums, p
            )
            row += 1


@inline
def multiply(
    num_rows: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` with at most MAX_ROWS of `num_rows` rows that lie as octets, and 4-bit weights."""
    unpacked, partial, steps = scratch + PARTIAL_BYTES, scratch, (num_blocks + 1) // 2
    factors, panel_scales = unpacked + steps * 2 * BYTES_BYTES, panel + num_blocks * BLOCK_BYTES[FACTORED]
    if num_rows < MANY_ROWS:
        _rows_by_steps(
            PACKED, 0, first, last, panel, panel_scales, 0, num_blocks, num_blocks, x, sums, partial
        )
        outliers.finish_sharing(
            PACKED, first, last, 0, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
        return
    unpack(panel, num_blocks, unpacked)
    next_panel = panel_scales + num_blocks * SCALE_BYTES[FACTORED] + ROW_SCALE_BYTES[FACTORED]
    stretches = -(-steps // MAX_STEPS)
    each = -(-steps // stretches)
    for begin in range(0, steps, each):
        count = 2 * min(each, steps - begin)
        following = next_panel + begin * PACKED_STEP_BYTES
        w, f = unpacked + begin * 2 * BYTES_BYTES, factors + begin * 2 * FACTOR_BYTES
        a, s = x + begin * OCTET_STEP_BYTES, sums + 2 * begin * TILE_SUMS_BYTES
        if begin == 0:
            _rows_by_steps(UNPACKED, 0, first, last, w, f, following, count, num_blocks, a, s, partial)
        else:
            _rows_by_steps(UNPACKED, 1, first, last, w, f, following, count, num_blocks, a, s, partial)
    if num_rows < LISTED_APART_FROM:
        outliers.finish_sharing(
            UNPACKED, first, last, unpacked, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
    else:
        # Where the bytes were, for nobody wants them any more: the first cache does not hold both.
        shorts.expand(0, panel, num_blocks, unpacked)
        outliers.finish(
            first, last, unpacked, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
