"""The integer products of attention by pairs of 16-bit integers: machines that have no dot product of four bytes.

Keys and values are made whole for it: once for all rows of a tile, or, for few rows, where they are multiplied.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.kv import BLOCK_TOKENS, LIMB_BITS, limb_bytes
from engine.kernels.matmul import PAIRS
from engine.kernels.simd import F32, F32_LANES, I16, I32_LANES, I64, LANES

Builder = Any
SHORT_LANES = ir.VectorType(I16, 2 * LANES)
GROUPS_OF_BLOCK = BLOCK_TOKENS // 4
MIN_ROWS = 9
"""Fewer rows are one or two groups of 4: what is made whole for each is multiplied at once, and what comes next fetched
meanwhile."""
LIMBS, WHOLE = range(2)
"""Keys and values as they lie in a block, or as `gather` leaves them."""
LINE_BYTES = (64, 128)
"""What four bytes of each of 16 columns take there."""
UNSIGNED, SIGNED = range(2)
"""Keys' high bytes, and values'."""


def spare_bytes(head_dim: int) -> int:
    """Working memory for one thread: keys and values of two blocks in 16 bits."""
    return 8 * BLOCK_TOKENS * head_dim


def _make_whole(builder: Builder, sign: int, high_at: Any, low_at: Any) -> list[Any]:
    """Both limbs of 64 bytes as 16 · h + l in pairs: of every four bytes 0 and 2, then 1 and 3."""
    b, move = builder, (builder.lshr, builder.ashr)[sign]
    upper, four, eight = (ir.Constant(SHORT_LANES, [value] * 2 * LANES) for value in (0xFF00, LIMB_BITS, 8))
    high, low = (b.bitcast(simd.load(b, at, I32_LANES, 64), SHORT_LANES) for at in (high_at, low_at))
    even = b.add(move(b.shl(high, eight), four), move(b.shl(low, eight), eight))
    odd = b.add(move(b.and_(high, upper), four), move(low, eight))
    return [even, odd]


@intrinsic
def _gather_lines(context: Any, sign: Any, high: Any, low: Any, count: Any, target: Any) -> Any:
    """`count` lines made whole."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, high_, low_, count_, target_ = args
        with cgutils.for_range(b, count_) as loop:
            places = (simd.place(b, base, loop.index, LINE_BYTES[LIMBS]) for base in (high_, low_))
            to = simd.place(b, target_, loop.index, LINE_BYTES[WHOLE])
            for index, pairs in enumerate(_make_whole(b, sign.literal_value, *places)):
                simd.store(b, pairs, simd.offset(b, to, 64 * index), 64)
        return c.get_dummy_value()

    return types.none(sign, *[types.int64] * 4), codegen


class _Sums:
    """Sums of `rows` rows times 16 columns while a kernel is emitted."""

    def __init__(self, builder: Builder, tag: str, rows: int) -> None:
        self._builder, self._pairs = builder, PAIRS[tag]
        self._accs = [cgutils.alloca_once(builder, I32_LANES) for _ in range(rows)]

    def clear(self) -> None:
        """Start anew."""
        for acc in self._accs:
            self._builder.store(ir.Constant(I32_LANES, [0] * LANES), acc)

    def add(self, form: int, sign: int, columns: Any, limb: Any, ahead: Any, rows: Any, stride: Any) -> None:
        """Products of four integers of each column with four of each row; rows lie `stride` apart. Both limbs of what
        lies `ahead` of limbs are fetched."""
        b = self._builder
        if form == WHOLE:
            whole = [simd.load(b, simd.offset(b, columns, 64 * pair), I32_LANES, 64) for pair in range(2)]
        else:
            places = (columns, b.add(columns, limb))
            for at in places:
                simd.prefetch(b, b.add(at, ahead))
            whole = [b.bitcast(pairs, I32_LANES) for pairs in _make_whole(b, sign, *places)]
        for pair, column in enumerate(whole):
            for r, acc in enumerate(self._accs):
                at = b.add(simd.offset(b, rows, 4 * pair), b.mul(stride, ir.Constant(I64, r)))
                b.store(self._pairs(b, b.load(acc), column, simd.splat_word(b, at)), acc)

    def results(self) -> list[Any]:
        """What each row's sums are."""
        return [self._builder.load(acc) for acc in self._accs]


@intrinsic
def _score_rows(
    context: Any,
    isa: Any,
    form: Any,
    count: Any,
    rows: Any,
    head_dim: Any,
    keys: Any,
    ahead: Any,
    scores: Any,
) -> Any:
    """`count` rows times 16 tokens, whose keys lie in `form`: scores[r] at a distance of 64 tokens."""
    if not isinstance(isa, IsaType):
        return None
    num_rows, kind = count.literal_value, form.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        *_, rows_, dims_, keys_, ahead_, scores_ = args
        sums = _Sums(b, isa.tag, num_rows)
        limb, stride = b.mul(dims_, ir.Constant(I64, BLOCK_TOKENS)), b.shl(dims_, ir.Constant(I64, 1))
        sums.clear()
        with cgutils.for_range(b, b.lshr(dims_, ir.Constant(I64, 2))) as loop:
            columns = simd.place(b, keys_, loop.index, LINE_BYTES[kind])
            sums.add(kind, UNSIGNED, columns, limb, ahead_, simd.place(b, rows_, loop.index, 8), stride)
        for r, value in enumerate(sums.results()):
            simd.store(b, value, simd.offset(b, scores_, 256 * r))
        return c.get_dummy_value()

    return types.none(isa, form, count, *[types.int64] * 5), codegen


@intrinsic
def _mix_rows(
    context: Any, isa: Any, form: Any, count: Any, rows: Any, head_dim: Any, first: Any, num_first: Any,
    second: Any, num_second: Any, ahead: Any, ahead_second: Any, shrinks: Any, units: Any, mixed: Any,
) -> Any:  # fmt: skip
    """`count` rows times all values, in `form`, of `num_first` and `num_second` groups of 4 tokens of two blocks."""
    if not isinstance(isa, IsaType):
        return None
    num_rows, kind = count.literal_value, form.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        *_, rows_, dims_, first_, num_first_, second_, num_second_, ahead_, ahead_second_, shrinks_, units_, mixed_ = (
            args
        )  # fmt: skip
        sums = _Sums(b, isa.tag, num_rows)
        limb, stride = b.mul(dims_, ir.Constant(I64, BLOCK_TOKENS)), ir.Constant(I64, 4 * BLOCK_TOKENS)
        # 16 dims of a group are a line.
        group_bytes = b.mul(dims_, ir.Constant(I64, LINE_BYTES[kind] // LANES))
        blocks = ((first_, num_first_, ahead_, 0), (second_, num_second_, ahead_second_, 2 * BLOCK_TOKENS))
        with cgutils.for_range(b, b.lshr(dims_, ir.Constant(I64, 4))) as column:
            sums.clear()
            for base, groups, distance, skipped in blocks:
                lines = simd.place(b, base, column.index, LINE_BYTES[kind])
                with cgutils.for_range(b, groups) as loop:
                    tokens = simd.offset(b, simd.place(b, rows_, loop.index, 8), skipped)
                    columns = b.add(lines, b.mul(loop.index, group_bytes))
                    sums.add(kind, SIGNED, columns, limb, distance, tokens, stride)
            for r, value in enumerate(sums.results()):
                row_at = b.add(mixed_, b.mul(b.shl(dims_, ir.Constant(I64, 2)), ir.Constant(I64, r)))
                spot = simd.place(b, row_at, column.index, 64)
                shrink, unit = (
                    simd.splat(b, simd.load(b, simd.offset(b, base, 4 * r), F32, 4), F32_LANES)
                    for base in (shrinks_, units_)
                )
                old = b.fmul(simd.load(b, spot, F32_LANES), shrink)
                simd.store(b, simd.fma_ir(b, b.sitofp(value, F32_LANES), unit, old), spot)
        return c.get_dummy_value()

    return types.none(isa, form, count, *[types.int64] * 11), codegen


@inline
def gather(
    head_dim: int, first: int, second: int, first_values: int, second_values: int, num_tokens: int, spare: int
) -> None:
    """Keys and values of a stretch's tokens as whole integers in `spare`."""
    limb = limb_bytes(head_dim)
    values = spare + 4 * limb
    here, there = min(num_tokens, BLOCK_TOKENS), max(0, num_tokens - BLOCK_TOKENS)
    # Keys lie 16 tokens by 16, values 4 by 4.
    half = head_dim // 4
    _gather_lines(UNSIGNED, first, first + limb, (here + 15) // 16 * half, spare)
    _gather_lines(UNSIGNED, second, second + limb, (there + 15) // 16 * half, spare + 2 * limb)
    quarter = head_dim // 16
    _gather_lines(SIGNED, first_values, first_values + limb, (here + 3) // 4 * quarter, values)
    _gather_lines(SIGNED, second_values, second_values + limb, (there + 3) // 4 * quarter, values + 2 * limb)


@inline
def _score_part(
    isa: Isa, form: int, begin: int, end: int, rows: int, head_dim: int, keys: int, ahead: int, scores: int
) -> None:
    row = begin
    while row < end:
        q, s = rows + row * 2 * head_dim, scores + row * 256
        if row + 4 <= end:
            _score_rows(isa, form, 4, q, head_dim, keys, ahead, s)
            row += 4
        elif row + 3 == end:
            _score_rows(isa, form, 3, q, head_dim, keys, ahead, s)
            row += 3
        elif row + 2 == end:
            _score_rows(isa, form, 2, q, head_dim, keys, ahead, s)
            row += 2
        else:
            _score_rows(isa, form, 1, q, head_dim, keys, ahead, s)
            row += 1


@inline
def score(
    isa: Isa, prepared: bool, begin: int, end: int, rows: int, head_dim: int, first: int, second: int,
    num_tokens: int, scores: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """See `attention_products.score`; `prepared`: after `gather`."""
    limb = limb_bytes(head_dim)
    for part in range((num_tokens + 15) // 16):
        if prepared:
            _score_part(isa, WHOLE, begin, end, rows, head_dim, spare + part * limb, 0, scores + part * 64)
        else:
            keys = (first if part < 2 else second) + part % 2 * (limb // 2)
            distance = ahead if part < 2 else ahead_second
            _score_part(isa, LIMBS, begin, end, rows, head_dim, keys, distance, scores + part * 64)


@inline
def _mix_groups(
    isa: Isa, form: int, begin: int, end: int, rows: int, head_dim: int, first: int, num_first: int, second: int,
    num_second: int, ahead: int, ahead_second: int, shrinks: int, units: int, mixed: int,
) -> None:  # fmt: skip
    here, there, a1, a2 = num_first, num_second, ahead, ahead_second
    row = begin
    while row < end:
        w, f, u = rows + row * 4 * BLOCK_TOKENS, shrinks + row * 4, units + row * 4
        m = mixed + row * head_dim * 4
        if row + 4 <= end:
            _mix_rows(isa, form, 4, w, head_dim, first, here, second, there, a1, a2, f, u, m)
            row += 4
        elif row + 3 == end:
            _mix_rows(isa, form, 3, w, head_dim, first, here, second, there, a1, a2, f, u, m)
            row += 3
        elif row + 2 == end:
            _mix_rows(isa, form, 2, w, head_dim, first, here, second, there, a1, a2, f, u, m)
            row += 2
        else:
            _mix_rows(isa, form, 1, w, head_dim, first, here, second, there, a1, a2, f, u, m)
            row += 1


@inline
def mix(
    isa: Isa, prepared: bool, begin: int, end: int, rows: int, head_dim: int, first: int, second: int,
    num_tokens: int, shrinks: int, units: int, mixed: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """See `attention_products.mix`; `prepared`: after `gather`."""
    limb = limb_bytes(head_dim)
    groups, values = (num_tokens + 3) // 4, spare + 4 * limb
    here, there = min(groups, GROUPS_OF_BLOCK), max(0, groups - GROUPS_OF_BLOCK)
    if prepared:
        _mix_groups(
            isa, WHOLE, begin, end, rows, head_dim, values, here, values + 2 * limb, there, 0, 0, shrinks, units,
            mixed,
        )  # fmt: skip
    else:
        _mix_groups(
            isa, LIMBS, begin, end, rows, head_dim, first, here, second, there, ahead, ahead_second, shrinks,
            units, mixed,
        )  # fmt: skip
