"""The integer products of attention by pairs of 16-bit integers: machines that have no dot product of four bytes.

Whole integers are multiplied; what the other ways leave out by definition, low limb times low limb, is taken off first,
and what remains is a multiple of LIMB. Keys and values of a stretch are made whole once, for all rows of a tile.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.kv import BLOCK_TOKENS, LIMB_BITS, limb_bytes
from engine.kernels.matmul import PAIRS
from engine.kernels.octets import bytes_products
from engine.kernels.simd import F32, F32_LANES, I16, I32_LANES, I64, LANES

Builder = Any
SHORT_LANES = ir.VectorType(I16, 2 * LANES)
GROUPS_OF_BLOCK = BLOCK_TOKENS // 4


def spare_bytes(head_dim: int) -> int:
    """Working memory for one thread: keys and values of two blocks in 16 bits."""
    return 8 * BLOCK_TOKENS * head_dim


@intrinsic
def _make_whole(context: Any, signed: Any, high: Any, low: Any, count: Any, target: Any) -> Any:
    """`count` lines of 64 bytes of both limbs as 16 · h + l in pairs: of every four bytes 0 and 2, then 1 and 3."""
    shift = "ashr" if signed.literal_value else "lshr"
    upper, four, eight = (ir.Constant(SHORT_LANES, [value] * 2 * LANES) for value in (0xFF00, LIMB_BITS, 8))

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, high_, low_, count_, target_ = args
        move = getattr(b, shift)
        with cgutils.for_range(b, count_) as loop:
            limbs = []
            for base in (high_, low_):
                line = simd.load(b, simd.place(b, base, loop.index, 64), I32_LANES, 64)
                limbs.append(b.bitcast(line, SHORT_LANES))
            h, rest = limbs
            to = simd.place(b, target_, loop.index, 2 * 64)
            even = b.add(move(b.shl(h, eight), four), move(b.shl(rest, eight), eight))
            odd = b.add(move(b.and_(h, upper), four), move(rest, eight))
            simd.store(b, even, to, 64)
            simd.store(b, odd, simd.offset(b, to, 64), 64)
        return c.get_dummy_value()

    return types.none(signed, *[types.int64] * 4), codegen


def _fetch_both(builder: Builder, low: Any, limb: Any, ahead: Any) -> None:
    """Fetch both limbs of what lies `ahead` of a line of low ones, while there is much to compute: to make a stretch
    whole is only to read."""
    for at in (low, builder.sub(low, limb)):
        simd.prefetch(builder, builder.add(at, ahead))


class _Sums:
    """Sums of `rows` rows times 16 columns while a kernel is emitted: products of low limbs first, then of wholes."""

    def __init__(self, builder: Builder, tag: str, rows: int) -> None:
        self._builder, self._pairs = builder, PAIRS[tag]
        self._lows = [cgutils.alloca_once(builder, SHORT_LANES) for _ in range(rows)]
        self._accs = [cgutils.alloca_once(builder, I32_LANES) for _ in range(rows)]

    def clear(self) -> None:
        """Start anew."""
        for low in self._lows:
            self._builder.store(ir.Constant(SHORT_LANES, [0] * 2 * LANES), low)

    def add_lows(self, column: Any, rows: Any, stride: Any, *, rows_signed: bool) -> None:
        """Products of a line of low limbs with four low limbs of each row, which lie `stride` apart."""
        b = self._builder
        for r, low in enumerate(self._lows):
            row = simd.splat_word(b, b.add(rows, b.mul(stride, ir.Constant(I64, r))))
            operands = (column, row) if rows_signed else (row, column)
            b.store(b.add(b.load(low), bytes_products(b, *operands)), low)

    def turn(self) -> None:
        """All low limbs are in: their sums are taken off what follows."""
        b, minus = self._builder, ir.Constant(SHORT_LANES, [-1] * 2 * LANES)
        for low, acc in zip(self._lows, self._accs, strict=True):
            shorts = (b.bitcast(value, I32_LANES) for value in (b.load(low), minus))
            b.store(self._pairs(b, ir.Constant(I32_LANES, [0] * LANES), *shorts), acc)

    def add_whole(self, columns: Any, rows: Any, stride: Any) -> None:
        """Products of two lines of pairs with four integers of each row."""
        b = self._builder
        for pair in range(2):
            column = simd.load(b, simd.offset(b, columns, 64 * pair), I32_LANES, 64)
            for r, acc in enumerate(self._accs):
                at = b.add(simd.offset(b, rows, 4 * pair), b.mul(stride, ir.Constant(I64, r)))
                b.store(self._pairs(b, b.load(acc), column, simd.splat_word(b, at)), acc)

    def results(self) -> list[Any]:
        """What each row's sums are, in units of LIMB."""
        bits = ir.Constant(I32_LANES, [LIMB_BITS] * LANES)
        return [self._builder.ashr(self._builder.load(acc), bits) for acc in self._accs]


@intrinsic
def _score_rows(
    context: Any,
    isa: Any,
    count: Any,
    whole: Any,
    low: Any,
    head_dim: Any,
    keys: Any,
    low_keys: Any,
    limb: Any,
    ahead: Any,
    scores: Any,
) -> Any:
    """`count` rows times 16 tokens: scores[r] at a distance of 64 tokens."""
    if not isinstance(isa, IsaType):
        return None
    rows = count.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, whole_, low_, dims_, keys_, low_keys_, limb_, ahead_, scores_ = args
        sums, groups = _Sums(b, isa.tag, rows), b.lshr(dims_, ir.Constant(I64, 2))
        sums.clear()
        with cgutils.for_range(b, groups) as loop:
            at = simd.place(b, low_keys_, loop.index, 64)
            _fetch_both(b, at, limb_, ahead_)
            column = simd.load(b, at, I32_LANES, 64)
            sums.add_lows(column, simd.place(b, low_, loop.index, 4), dims_, rows_signed=True)
        sums.turn()
        with cgutils.for_range(b, groups) as loop:
            stride = b.shl(dims_, ir.Constant(I64, 1))
            sums.add_whole(
                simd.place(b, keys_, loop.index, 128), simd.place(b, whole_, loop.index, 8), stride
            )
        for r, value in enumerate(sums.results()):
            simd.store(b, value, simd.offset(b, scores_, 256 * r))
        return c.get_dummy_value()

    return types.none(isa, count, *[types.int64] * 8), codegen


@intrinsic
def _mix_rows(
    context: Any, isa: Any, count: Any, whole: Any, low: Any, head_dim: Any, values: Any, first_low: Any,
    num_first: Any, second_low: Any, num_second: Any, limb: Any, ahead: Any, ahead_second: Any, shrinks: Any,
    units: Any, mixed: Any,
) -> Any:  # fmt: skip
    """`count` rows times all values of `num_first` and `num_second` groups of 4 tokens of two blocks."""
    if not isinstance(isa, IsaType):
        return None
    rows = count.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        (
            _,
            _,
            whole_,
            low_,
            dims_,
            values_,
            first_,
            num_first_,
            second_,
            num_second_,
            limb_,
            *distances,
            _,
            _,
            _,
        ) = args
        ends = args[-3:]
        sums = _Sums(b, isa.tag, rows)
        low_stride, stride = ir.Constant(I64, 64), ir.Constant(I64, 128)
        with cgutils.for_range(b, b.lshr(dims_, ir.Constant(I64, 4))) as column:
            shift = b.mul(column.index, ir.Constant(I64, 64))
            sums.clear()
            for base, groups, skipped, ahead_ in (
                (first_, num_first_, 0, distances[0]),
                (second_, num_second_, BLOCK_TOKENS, distances[1]),
            ):
                with cgutils.for_range(b, groups) as loop:
                    at = b.add(b.add(base, shift), b.mul(loop.index, b.shl(dims_, ir.Constant(I64, 2))))
                    _fetch_both(b, at, limb_, ahead_)
                    tokens = simd.offset(b, simd.place(b, low_, loop.index, 4), skipped)
                    sums.add_lows(simd.load(b, at, I32_LANES, 64), tokens, low_stride, rows_signed=False)
            sums.turn()
            # The second block's groups follow the first's, which are all there when there is a second one.
            with cgutils.for_range(b, b.add(num_first_, num_second_)) as loop:
                at = b.add(
                    b.add(values_, b.shl(shift, ir.Constant(I64, 1))),
                    b.mul(loop.index, b.shl(dims_, ir.Constant(I64, 3))),
                )
                sums.add_whole(at, simd.place(b, whole_, loop.index, 8), stride)
            for r, value in enumerate(sums.results()):
                spot = b.add(
                    b.add(ends[2], shift), b.mul(b.shl(dims_, ir.Constant(I64, 2)), ir.Constant(I64, r))
                )
                shrink, unit = (
                    simd.splat(b, simd.load(b, simd.offset(b, base, 4 * r), F32, 4), F32_LANES)
                    for base in ends[:2]
                )
                old = b.fmul(simd.load(b, spot, F32_LANES), shrink)
                simd.store(b, simd.fma_ir(b, b.sitofp(value, F32_LANES), unit, old), spot)
        return c.get_dummy_value()

    return types.none(isa, count, *[types.int64] * 14), codegen


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
    _make_whole(0, first, first + limb, (here + 15) // 16 * half, spare)
    _make_whole(0, second, second + limb, (there + 15) // 16 * half, spare + 2 * limb)
    quarter = head_dim // 16
    _make_whole(1, first_values, first_values + limb, (here + 3) // 4 * quarter, values)
    _make_whole(1, second_values, second_values + limb, (there + 3) // 4 * quarter, values + 2 * limb)


@inline
def score(
    isa: Isa, begin: int, end: int, whole: int, low: int, head_dim: int, first: int, second: int, num_tokens: int,
    scores: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """See `attention_products.score`; after `gather`."""
    limb = limb_bytes(head_dim)
    for part in range((num_tokens + 15) // 16):
        keys = spare + part * limb
        low_keys = (first if part < 2 else second) + limb + part % 2 * (limb // 2)
        distance = ahead if part < 2 else ahead_second
        row = begin
        while row < end:
            w, b, s = whole + row * 2 * head_dim, low + row * head_dim, scores + row * 256 + part * 64
            if row + 4 <= end:
                _score_rows(isa, 4, w, b, head_dim, keys, low_keys, limb, distance, s)
                row += 4
            elif row + 3 == end:
                _score_rows(isa, 3, w, b, head_dim, keys, low_keys, limb, distance, s)
                row += 3
            elif row + 2 == end:
                _score_rows(isa, 2, w, b, head_dim, keys, low_keys, limb, distance, s)
                row += 2
            else:
                _score_rows(isa, 1, w, b, head_dim, keys, low_keys, limb, distance, s)
                row += 1


@inline
def mix(
    isa: Isa, begin: int, end: int, whole: int, low: int, head_dim: int, first: int, second: int, num_tokens: int,
    shrinks: int, units: int, mixed: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """See `attention_products.mix`; after `gather`."""
    limb = limb_bytes(head_dim)
    groups, values = (num_tokens + 3) // 4, spare + 4 * limb
    here, there = min(groups, GROUPS_OF_BLOCK), max(0, groups - GROUPS_OF_BLOCK)
    low_first, low_second = first + limb, second + limb
    row = begin
    while row < end:
        w, b = whole + row * 128, low + row * 64
        f, u, m = shrinks + row * 4, units + row * 4, mixed + row * head_dim * 4
        if row + 4 <= end:
            _mix_rows(
                isa,
                4,
                w,
                b,
                head_dim,
                values,
                low_first,
                here,
                low_second,
                there,
                limb,
                ahead,
                ahead_second,
                f,
                u,
                m,
            )
            row += 4
        elif row + 3 == end:
            _mix_rows(
                isa,
                3,
                w,
                b,
                head_dim,
                values,
                low_first,
                here,
                low_second,
                there,
                limb,
                ahead,
                ahead_second,
                f,
                u,
                m,
            )
            row += 3
        elif row + 2 == end:
            _mix_rows(
                isa,
                2,
                w,
                b,
                head_dim,
                values,
                low_first,
                here,
                low_second,
                there,
                limb,
                ahead,
                ahead_second,
                f,
                u,
                m,
            )
            row += 2
        else:
            _mix_rows(
                isa,
                1,
                w,
                b,
                head_dim,
                values,
                low_first,
                here,
                low_second,
                there,
                limb,
                ahead,
                ahead_second,
                f,
                u,
                m,
            )
            row += 1
