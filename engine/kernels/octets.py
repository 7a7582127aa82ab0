"""Products of 4-bit weights with signed bytes, two to a lane of 16 bits: machines without a dot product of four bytes.

The products of a block fit their lanes, 8 · 2 · 15 · 127 < 2^15, and are then scaled by D; M times the sum of the block
comes on top. A row's outliers, which are 0 among the bytes, follow one by one, each times D · q + M of its input. The
integers are those of `matmul.py`.
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
UNPACKED_BYTES = 8 * 64 + 2 * 64
"""One block of a panel: its integers as bytes, then D and M, each in both halves of 32 bits."""
MAX_BLOCKS = 18
"""Blocks whose weights and rows stay in the first cache, for every second step of a row falls on the same lines of it.
An even number."""
ROWS_TO_EXPAND_FOR = 48
"""From so many rows on it pays to make weights whole for outliers."""


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply` for one thread."""
    return PARTIAL_BYTES + num_inputs // 32 * (UNPACKED_BYTES + EXPANDED_BYTES) + EXPANDED_BYTES


def bytes_products(builder: Builder, unsigned: Any, signed: Any) -> Any:
    """Products of 64 bytes each, two added to a lane of 16 bits."""
    parts, bytes64 = [], ir.VectorType(I8, 4 * LANES)
    args = [builder.bitcast(value, bytes64) for value in (unsigned, signed)]
    for start in (0, 32):
        order = ir.Constant(ir.VectorType(I32, 32), list(range(start, start + 32)))
        halves = [builder.shuffle_vector(value, value, order) for value in args]
        parts.append(simd.call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), halves))
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _fetch_next_rows(builder: Builder, rows: Any, block: Any) -> None:
    """Fetch a step's octets of the four rows that come next in a tile, two of them with each of its blocks."""
    # A row's second block begins 32 bytes after its first.
    odd = builder.mul(builder.and_(block, ir.Constant(I64, 1)), ir.Constant(I64, 2 * OCTET_ROW_BYTES - 32))
    for row in (4, 5):
        simd.prefetch(builder, builder.add(simd.offset(builder, rows, OCTET_ROW_BYTES * row), odd), cache=1)


def _place(builder: Builder, base: Any, index: Any, num_bytes: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(I64, num_bytes)))


def _splat_word(builder: Builder, address: Any) -> Any:
    return simd.splat(builder, simd.load(builder, address, I32, 4), I32_LANES)


def _factor_and_addend(builder: Builder, scales: Any) -> Iterator[Any]:
    """D and M of a block, each in both halves of 32 bits."""
    for skipped in (0, 32):
        narrow = simd.load(builder, simd.offset(builder, scales, skipped), ir.VectorType(I16, LANES), 32)
        wide = builder.zext(narrow, I32_LANES)
        yield builder.or_(wide, builder.shl(wide, ir.Constant(I32_LANES, [16] * LANES)))


def _packed_block(builder: Builder, panel: Any, scales: Any, block: Any) -> Iterator[Any]:
    """The lines of one block as UNPACKED_BYTES has them, from the packed panel."""
    yield from unpack_ir(builder, FACTORED, _place(builder, panel, block, BLOCK_BYTES[FACTORED]))
    yield from _factor_and_addend(builder, _place(builder, scales, block, SCALE_BYTES[FACTORED]))


def _ready_block(builder: Builder, address: Any) -> Iterator[Any]:
    """The lines of one block that was unpacked, each loaded when it is asked for: registers are few."""
    return (simd.load(builder, simd.offset(builder, address, 64 * line), I32_LANES, 64) for line in range(10))


@intrinsic
def _unpack(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel, UNPACKED_BYTES a block."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scales = _place(b, panel_, blocks_, BLOCK_BYTES[FACTORED])
        with cgutils.for_range(b, blocks_) as loop:
            to = _place(b, target_, loop.index, UNPACKED_BYTES)
            for index, line in enumerate(_packed_block(b, panel_, scales, loop.index)):
                simd.store(b, line, simd.offset(b, to, 64 * index), 64)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@intrinsic
def _multiply_blocks(
    context: Any, form: Any, joined: Any, rows: Any, weights: Any, scales_or_next: Any, num_blocks: Any, x: Any,
    sums: Any, partial: Any,
) -> Any:  # fmt: skip
    """`rows` rows without outliers times some blocks of a panel into `partial` [row][16 outputs], added to what is
    there when `joined`.

    `weights`: blocks as `_unpack` leaves them, and where those of the next panel lie; or packed, and their scales."""
    kind, with_partial, count = form.literal_value, joined.literal_value, rows.literal_value
    pairs = PAIRS["avx2"]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, weights_, scales_or_next_, blocks_, x_, sums_, partial_ = args
        accs = [cgutils.alloca_once(b, I32_LANES) for _ in range(count)]
        for r, acc in enumerate(accs):
            b.store(ir.Constant(I32_LANES, [0] * LANES), acc)
            if with_partial:
                b.store(simd.load(b, simd.offset(b, partial_, 64 * r), I32_LANES, 64), acc)
        with cgutils.for_range(b, blocks_) as loop:
            if kind == UNPACKED:
                lines = _ready_block(b, _place(b, weights_, loop.index, UNPACKED_BYTES))
                # Here, while there is much to compute: to unpack is only to read.
                fetch_ahead(b, FACTORED, scales_or_next_, loop.index, 0)
            else:
                lines = _packed_block(b, weights_, scales_or_next_, loop.index)
                fetch_ahead(b, FACTORED, weights_, loop.index)
            rows_at = block_of_rows(b, OCTETS, x_, loop.index)
            if kind == UNPACKED:
                _fetch_next_rows(b, rows_at, loop.index)
            parts: list[Any] = [None] * count
            for group, line in zip(range(8), lines, strict=False):
                for r in range(count):
                    quad = _splat_word(b, simd.offset(b, rows_at, OCTET_ROW_BYTES * r + 4 * group))
                    product = bytes_products(b, line, quad)
                    parts[r] = b.add(parts[r], product) if group else product
            factor, addend = lines
            sums_at = _place(b, sums_, loop.index, TILE_SUMS_BYTES)
            for r, (acc, part) in enumerate(zip(accs, parts, strict=True)):
                total = _splat_word(b, simd.offset(b, sums_at, SUM_BYTES * r + SUM_WORD))
                value = pairs(b, b.load(acc), b.bitcast(part, I32_LANES), factor)
                b.store(pairs(b, value, total, addend), acc)
        for r, acc in enumerate(accs):
            simd.store(b, b.load(acc), simd.offset(b, partial_, 64 * r), 64)
        return c.get_dummy_value()

    return types.none(form, joined, rows, *[types.int64] * 6), codegen


def _pairs_of_line(builder: Builder, line_at: Any, ready: Any, panel: Any, scales: Any) -> Any:
    """D · q + M of two inputs as pairs, see `shorts.expand`, from a panel that was unpacked to `ready`, or packed.

    `line_at`: where its line would lie among expanded ones."""
    b = builder
    block, group, odd = (
        b.and_(b.lshr(line_at, ir.Constant(I64, bits)), ir.Constant(I64, mask))
        for bits, mask in ((10, 0x7FF), (7, 7), (6, 1))
    )
    shift = b.shl(odd, ir.Constant(I64, 3))
    if ready is not None:
        base, bits = _place(b, ready, block, UNPACKED_BYTES), 0x00FF00FF
        factor, addend = (simd.load(b, simd.offset(b, base, at), I32_LANES, 64) for at in (512, 576))
    else:
        base, bits = _place(b, panel, block, BLOCK_BYTES[FACTORED]), 0x000F000F
        factor, addend = _factor_and_addend(b, _place(b, scales, block, SCALE_BYTES[FACTORED]))
        # Group g + 4 is the high halves of group g's bytes.
        shift = b.or_(shift, b.and_(group, ir.Constant(I64, 4)))
        group = b.and_(group, ir.Constant(I64, 3))
    bytes_ = simd.load(b, _place(b, base, group, 64), I32_LANES, 64)
    moved = b.lshr(bytes_, simd.splat(b, b.trunc(shift, I32), I32_LANES))
    q, factor, addend = (
        b.bitcast(value, SHORT_LANES)
        for value in (b.and_(moved, ir.Constant(I32_LANES, [bits] * LANES)), factor, addend)
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
        # The rows' lists side by side, zeros after the end of the shorter: a loop that ends is dear.
        with cgutils.for_range(b, most) as loop:
            line, place = (
                operation(loop.index, ir.Constant(I64, ENTRIES_OF_LINE)) for operation in (b.udiv, b.urem)
            )
            first = _place(b, _place(b, lists_, line, OCTET_STEP_BYTES), place, ENTRY_BYTES)
            for r, acc in enumerate(accs):
                entry = simd.offset(b, first, OCTET_ROW_BYTES * r)
                line_at = b.zext(simd.load(b, entry, I32, 4), I64)
                if kind == EXPANDED:
                    weights = simd.load(b, b.add(lines_, line_at), I32_LANES, 64)
                else:
                    ready = lines_ if kind == UNPACKED else None
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
def _rows_by_blocks(
    form: int, joined: int, first: int, last: int, weights: int, scales_or_next: int, count: int, num_blocks: int,
    x: int, sums: int, partial: int,
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
            _multiply_blocks(form, joined, 4, weights, scales_or_next, count, a, s, p)
            row += 4
        elif row + 3 <= last:
            _multiply_blocks(form, joined, 3, weights, scales_or_next, count, a, s, p)
            row += 3
        elif row + 2 <= last:
            _multiply_blocks(form, joined, 2, weights, scales_or_next, count, a, s, p)
            row += 2
        else:
            _multiply_blocks(form, joined, 1, weights, scales_or_next, count, a, s, p)
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
    unpacked, partial = scratch + PARTIAL_BYTES, scratch
    lines, panel_scales = unpacked + num_blocks * UNPACKED_BYTES, panel + num_blocks * BLOCK_BYTES[FACTORED]
    if last - first < MANY_ROWS:
        _rows_by_blocks(PACKED, 0, first, last, panel, panel_scales, num_blocks, num_blocks, x, sums, partial)
        _finish(PACKED, first, last, 0, panel, num_blocks, x, sums, scales, out, out_stride, add, partial)
        return
    _unpack(panel, num_blocks, unpacked)
    next_panel = panel_scales + num_blocks * SCALE_BYTES[FACTORED] + ROW_SCALE_BYTES[FACTORED]
    stretches = -(-num_blocks // MAX_BLOCKS)
    each = -(-num_blocks // (2 * stretches)) * 2
    for begin in range(0, num_blocks, each):
        count = min(each, num_blocks - begin)
        following = next_panel + begin * (BLOCK_BYTES[FACTORED] + SCALE_BYTES[FACTORED])
        w, a, s = (
            unpacked + begin * UNPACKED_BYTES,
            x + begin // 2 * OCTET_STEP_BYTES,
            sums + begin * TILE_SUMS_BYTES,
        )
        if begin == 0:
            _rows_by_blocks(UNPACKED, 0, first, last, w, following, count, num_blocks, a, s, partial)
        else:
            _rows_by_blocks(UNPACKED, 1, first, last, w, following, count, num_blocks, a, s, partial)
    if last - first < ROWS_TO_EXPAND_FOR:
        _finish(
            UNPACKED, first, last, unpacked, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
    else:
        shorts.expand(0, panel, num_blocks, lines)
        _finish(
            EXPANDED, first, last, lines, panel, num_blocks, x, sums, scales, out, out_stride, add, partial
        )
