"""The integer products of attention by dot products of four bytes: few rows, or a machine without tiles."""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.kv import BLOCK_TOKENS, scales_at
from engine.kernels.matmul import DOT_SHORT
from engine.kernels.simd import F32, F32_LANES, I32_LANES, I64, LANES

Builder = Any


def _accs(builder: Builder, count: int) -> list[Any]:
    return [cgutils.alloca_once(builder, I32_LANES) for _ in range(count)]


def _clear(builder: Builder, accs: list[Any]) -> None:
    for acc in accs:
        builder.store(ir.Constant(I32_LANES, [0] * LANES), acc)


@intrinsic
def _score_rows(
    context: Any, isa: Any, count: Any, rows: Any, head_dim: Any, keys: Any, scores: Any, ahead: Any
) -> Any:
    """`count` rows times 16 tokens of a block: scores[r] at a distance of 64 tokens."""
    if not isinstance(isa, IsaType):
        return None
    num_rows = count.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, rows_, dims_, keys_, scores_, ahead_ = args
        accs = _accs(b, num_rows)
        _clear(b, accs)
        with cgutils.for_range(b, b.lshr(dims_, ir.Constant(I64, 2))) as loop:
            at = simd.place(b, keys_, loop.index, 64)
            simd.prefetch(b, b.add(at, ahead_))
            key = simd.load(b, at, I32_LANES, 64)
            dim = b.mul(loop.index, ir.Constant(I64, 4))
            for r, acc in enumerate(accs):
                quad = simd.splat_word(b, b.add(rows_, b.add(dim, b.mul(dims_, ir.Constant(I64, r)))))
                b.store(DOT_SHORT[isa.tag](b, b.load(acc), key, quad), acc)
        for r, acc in enumerate(accs):
            simd.store(b, b.load(acc), simd.offset(b, scores_, 256 * r))
        return c.get_dummy_value()

    return types.none(isa, count, *[types.int64] * 5), codegen


@intrinsic
def _mix_rows(
    context: Any,
    isa: Any,
    count: Any,
    rows: Any,
    head_dim: Any,
    first: Any,
    num_first: Any,
    second: Any,
    num_second: Any,
    shrinks: Any,
    units: Any,
    mixed: Any,
    ahead: Any,
    ahead_second: Any,
) -> Any:
    """`count` rows times all values of `num_first` and `num_second` groups of 4 tokens of two blocks."""
    if not isinstance(isa, IsaType):
        return None
    num_rows = count.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        (
            _,
            _,
            rows_,
            dims_,
            first_,
            num_first_,
            second_,
            num_second_,
            shrinks_,
            units_,
            mixed_,
            *aheads,
        ) = args
        row_bytes = group_bytes = b.mul(dims_, ir.Constant(I64, 4))
        with cgutils.for_range(b, b.lshr(dims_, ir.Constant(I64, 4))) as column:
            shift = b.mul(column.index, ir.Constant(I64, 64))
            accs = _accs(b, num_rows)
            _clear(b, accs)
            blocks = (
                (first_, num_first_, 0, aheads[0]),
                (second_, num_second_, BLOCK_TOKENS, aheads[1]),
            )
            for block, groups, skipped, ahead_ in blocks:
                with cgutils.for_range(b, groups) as loop:
                    here = b.add(b.add(block, shift), b.mul(loop.index, group_bytes))
                    simd.prefetch(b, b.add(here, ahead_))
                    value = simd.load(b, here, I32_LANES, 64)
                    token = b.add(b.mul(loop.index, ir.Constant(I64, 4)), ir.Constant(I64, skipped))
                    for r, acc in enumerate(accs):
                        quad = simd.splat_word(b, simd.offset(b, b.add(rows_, token), 64 * r))
                        b.store(DOT_SHORT[isa.tag](b, b.load(acc), quad, value), acc)
            for r, acc in enumerate(accs):
                integer = b.load(acc)
                spot = b.add(b.add(mixed_, shift), b.mul(row_bytes, ir.Constant(I64, r)))
                shrink, unit = (
                    simd.splat(b, simd.load(b, simd.offset(b, base, 4 * r), F32, 4), F32_LANES)
                    for base in (shrinks_, units_)
                )
                old = b.fmul(simd.load(b, spot, F32_LANES), shrink)
                simd.store(b, simd.fma_ir(b, b.sitofp(integer, F32_LANES), unit, old), spot)
        return c.get_dummy_value()

    return types.none(isa, count, *[types.int64] * 11), codegen


@inline
def score(
    isa: Isa, begin: int, end: int, rows: int, head_dim: int, first: int, second: int, num_tokens: int,
    scores: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """See `attention_products.score`."""
    for part in range((num_tokens + 15) // 16):
        keys = (first if part < 2 else second) + part % 2 * (scales_at(head_dim) // 2)
        fetched = ahead if part < 2 else ahead_second
        row = begin
        while row < end:
            q, s = rows + row * head_dim, scores + row * 256 + part * 64
            if row + 4 <= end:
                _score_rows(isa, 4, q, head_dim, keys, s, fetched)
                row += 4
            elif row + 3 == end:
                _score_rows(isa, 3, q, head_dim, keys, s, fetched)
                row += 3
            elif row + 2 == end:
                _score_rows(isa, 2, q, head_dim, keys, s, fetched)
                row += 2
            else:
                _score_rows(isa, 1, q, head_dim, keys, s, fetched)
                row += 1


@inline
def mix(
    isa: Isa, begin: int, end: int, rows: int, head_dim: int, first: int, second: int, num_tokens: int,
    shrinks: int, units: int, mixed: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """See `attention_products.mix`."""
    groups = (num_tokens + 3) // 4
    here, there = min(groups, BLOCK_TOKENS // 4), max(0, groups - BLOCK_TOKENS // 4)
    row = begin
    while row < end:
        w = rows + row * 64
        f, u, m = shrinks + row * 4, units + row * 4, mixed + row * head_dim * 4
        if row + 4 <= end:
            _mix_rows(isa, 4, w, head_dim, first, here, second, there, f, u, m, ahead, ahead_second)
            row += 4
        elif row + 3 == end:
            _mix_rows(isa, 3, w, head_dim, first, here, second, there, f, u, m, ahead, ahead_second)
            row += 3
        elif row + 2 == end:
            _mix_rows(isa, 2, w, head_dim, first, here, second, there, f, u, m, ahead, ahead_second)
            row += 2
        else:
            _mix_rows(isa, 1, w, head_dim, first, here, second, there, f, u, m, ahead, ahead_second)
            row += 1
