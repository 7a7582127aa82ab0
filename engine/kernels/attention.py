"""Attention of a tile of queries over paged KV, each key and value read once, scores never in memory.

A block of one layer and KV head holds K as [head_dim][32 tokens] and V as [32 tokens][head_dim], half floats.
Queries of all heads that share the KV head go together. Softmax runs online, one block of 32 tokens after the
other from position 0, and every row's arithmetic is its own: a row gets the same bits in any tile.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels import simd
from engine.kernels.jit import cgutils, inline, intrinsic, jit, types
from engine.kernels.simd import F16_LANES, F32, F32_LANES, I64

Builder = Any
TILE_POSITIONS = 16
BLOCK_TOKENS = 32
WIDEN_ROWS = 8
"""From this many rows on it pays to convert a block's K and V to 32 bits once."""
MINUS_INFINITY = np.float32(-np.inf)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


def _floats(builder: Builder, address: Any, size: int) -> Any:
    """16 floats of `size` bytes each at an address, as 32-bit floats."""
    if size == 4:
        return simd.load(builder, address, F32_LANES, 64)
    return builder.fpext(simd.load(builder, address, F16_LANES, 32), F32_LANES)


@intrinsic
def _scores(
    context: Any,
    rows: Any,
    widened: Any,
    queries: Any,
    query_stride: Any,
    keys: Any,
    head_dim: Any,
    scores: Any,
    ahead: Any,
) -> Any:
    """scores[r][32] = Σ_d queries[r][d] · keys[d][32] in the order of d; fetches what lies `ahead` of the keys."""
    count, size = rows.literal_value, 4 if widened.literal_value else 2

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, queries_, stride_, keys_, dims_, scores_, ahead_ = args
        zero = ir.Constant(F32_LANES, [0.0] * 16)
        accs = [[cgutils.alloca_once_value(b, zero) for _ in range(2)] for _ in range(count)]
        bases = [b.add(queries_, b.mul(stride_, ir.Constant(I64, r))) for r in range(count)]
        with cgutils.for_range(b, dims_) as loop:
            at = b.add(keys_, b.mul(loop.index, ir.Constant(I64, BLOCK_TOKENS * size)))
            if size == 2:
                simd.prefetch(b, b.add(at, ahead_))
            key = [_floats(b, simd.offset(b, at, 16 * size * half), size) for half in range(2)]
            dim = b.mul(loop.index, ir.Constant(I64, 4))
            for r in range(count):
                q = simd.splat(b, simd.load(b, b.add(bases[r], dim), F32, 4), F32_LANES)
                for half in range(2):
                    b.store(simd.fma_ir(b, q, key[half], b.load(accs[r][half])), accs[r][half])
        for r in range(count):
            for half in range(2):
                simd.store(b, b.load(accs[r][half]), simd.offset(b, scores_, 128 * r + 64 * half))
        return c.get_dummy_value()

    return types.none(rows, widened, *[types.int64] * 6), codegen


@intrinsic
def _mix(
    context: Any,
    rows: Any,
    widened: Any,
    weights: Any,
    values: Any,
    num_tokens: Any,
    head_dim: Any,
    rescale: Any,
    out: Any,
    ahead: Any,
) -> Any:
    """out[r] = out[r] · rescale[r] + Σ_t weights[r][t] · values[t], in the order of t; fetches ahead of the values."""
    count, size = rows.literal_value, 4 if widened.literal_value else 2

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, weights_, values_, tokens_, dims_, rescale_, out_, ahead_ = args
        row_bytes = b.mul(dims_, ir.Constant(I64, 4))
        targets = [b.add(out_, b.mul(row_bytes, ir.Constant(I64, r))) for r in range(count)]
        with cgutils.for_range(b, b.sdiv(dims_, ir.Constant(I64, 32))) as column:
            shift = b.mul(column.index, ir.Constant(I64, 128))
            first = b.mul(column.index, ir.Constant(I64, 32))
            accs = []
            for r in range(count):
                factor = simd.splat(b, simd.load(b, simd.offset(b, rescale_, 4 * r), F32, 4), F32_LANES)
                spots = [simd.offset(b, b.add(targets[r], shift), 64 * half) for half in range(2)]
                old = [b.fmul(simd.load(b, spot, F32_LANES), factor) for spot in spots]
                accs.append([cgutils.alloca_once(b, F32_LANES) for _ in range(2)])
                for half in range(2):
                    b.store(old[half], accs[r][half])
            with cgutils.for_range(b, tokens_) as loop:
                at = b.mul(b.add(b.mul(loop.index, dims_), first), ir.Constant(I64, size))
                at = b.add(values_, at)
                if size == 2:
                    simd.prefetch(b, b.add(at, ahead_))
                value = [_floats(b, simd.offset(b, at, 16 * size * half), size) for half in range(2)]
                token = b.mul(loop.index, ir.Constant(I64, 4))
                for r in range(count):
                    spot = simd.offset(b, b.add(weights_, token), 128 * r)
                    w = simd.splat(b, simd.load(b, spot, F32, 4), F32_LANES)
                    for half in range(2):
                        b.store(simd.fma_ir(b, w, value[half], b.load(accs[r][half])), accs[r][half])
            for r in range(count):
                for half in range(2):
                    spot = simd.offset(b, b.add(targets[r], shift), 64 * half)
                    simd.store(b, b.load(accs[r][half]), spot)
        return c.get_dummy_value()

    return types.none(rows, widened, *[types.int64] * 7), codegen


@intrinsic
def _widen(context: Any, source: Any, count: Any, target: Any, ahead: Any) -> Any:
    """`count` times 16 half floats to floats; fetches what lies `ahead` of them."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        with cgutils.for_range(b, args[1]) as loop:
            at = b.add(args[0], b.mul(loop.index, ir.Constant(I64, 32)))
            simd.prefetch(b, b.add(at, args[3]))
            half = simd.load(b, at, F16_LANES, 32)
            simd.store(
                b, b.fpext(half, F32_LANES), b.add(args[2], b.mul(loop.index, ir.Constant(I64, 64))), 64
            )
        return c.get_dummy_value()

    return types.none(*[types.int64] * 4), codegen


@inline
def _softmax(
    first_row: int, count: int, first_last: int, group: int, scores: int, rescale: int, peaks: int, sums: int
) -> None:
    """One block of the online softmax for `count` rows: scores become weights.

    The last token of the block that row r may see is `first_last` + r // group.
    """
    for row in range(first_row, first_row + count):
        first, second = simd.load_f32(scores + row * 128), simd.load_f32(scores + row * 128 + 64)
        last = first_last + row // group
        if last < BLOCK_TOKENS - 1:
            first = simd.keep_until(first, last, MINUS_INFINITY)
            second = simd.keep_until(second, last - 16, MINUS_INFINITY)
        old = simd.read_f32(peaks + row * 4)
        peak = max(old, simd.largest(simd.larger(first, second)))
        level = simd.splat_f32(peak)
        first, second = simd.exp(first - level), simd.exp(second - level)
        shrink = ONE
        if peak != old:
            shrink = simd.largest(simd.exp(simd.splat_f32(old - peak)))
            simd.write_f32(peaks + row * 4, peak)
        simd.store_f32(
            sums + row * 64,
            simd.fma(simd.load_f32(sums + row * 64), simd.splat_f32(shrink), first + second),
        )
        simd.write_f32(rescale + row * 4, shrink)
        simd.store_f32(scores + row * 128, first)
        simd.store_f32(scores + row * 128 + 64, second)


def scratch_bytes(group: int, head_dim: int) -> int:
    """Working memory of `attend` for one thread."""
    rows = group * TILE_POSITIONS
    return rows * (2 * head_dim * 4 + BLOCK_TOKENS * 4 + 64 + 64) + 2 * BLOCK_TOKENS * head_dim * 4 + 64 * 8


@jit
def attend(
    queries: int,
    query_stride: int,
    num_positions: int,
    first_position: int,
    group: int,
    head_dim: int,
    table: int,
    cache: int,
    block_bytes: int,
    keys_at: int,
    values_at: int,
    out: int,
    out_stride: int,
    scratch: int,
) -> None:
    """Attention of `num_positions` rows of `group` heads, head_dim floats each, at `queries`; positions count on.

    `table`: int32 block ids of the sequence; `keys_at`, `values_at`: byte offsets within a block.
    """
    rows, head_bytes = group * num_positions, head_dim * 4
    tile = scratch
    mixed = tile + rows * head_bytes
    keys = mixed + rows * head_bytes
    values = keys + BLOCK_TOKENS * head_bytes
    scores = values + BLOCK_TOKENS * head_bytes
    sums = scores + rows * 128
    peaks = sums + rows * 64
    rescale = peaks + rows * 4
    zero = simd.splat_f32(ZERO)
    for position in range(num_positions):
        for member in range(group):
            row = position * group + member
            source = queries + position * query_stride + member * head_bytes
            for at in range(0, head_bytes, 64):
                simd.store_f32(tile + row * head_bytes + at, simd.load_f32(source + at))
                simd.store_f32(mixed + row * head_bytes + at, zero)
            simd.write_f32(peaks + row * 4, MINUS_INFINITY)
            simd.store_f32(sums + row * 64, zero)
    last_position = first_position + num_positions - 1
    last_block = last_position // BLOCK_TOKENS
    for block in range(last_block + 1):
        start = block * BLOCK_TOKENS
        base = cache + simd.read_i32(table + block * 4) * block_bytes
        # A head's part of a block is too short for the hardware to see where the next one lies: in the next
        # block, and after the last one in the first, where the next head's part is.
        following = block + 1 if block < last_block else 0
        ahead = cache + simd.read_i32(table + following * 4) * block_bytes - base
        if block == last_block:
            ahead += BLOCK_TOKENS * head_dim * 2
        tokens = min(BLOCK_TOKENS, last_position - start + 1)
        # Rows that lie wholly before this block come first in the tile and are done.
        row = max(0, start - first_position) * group
        if rows - row >= WIDEN_ROWS:
            _widen(base + keys_at, head_dim * 2, keys, ahead)
            _widen(base + values_at, tokens * head_dim // 16, values, ahead)
        while rows - row >= WIDEN_ROWS:
            s = scores + row * 128
            _scores(8, 1, tile + row * head_bytes, head_bytes, keys, head_dim, s, ahead)
            _softmax(row, 8, first_position - start, group, scores, rescale, peaks, sums)
            _mix(8, 1, s, values, tokens, head_dim, rescale + row * 4, mixed + row * head_bytes, ahead)
            row += 8
        while row < rows:
            count = min(rows - row, 4)
            q, s = tile + row * head_bytes, scores + row * 128
            k, v = base + keys_at, base + values_at
            if count == 4:
                _scores(4, 0, q, head_bytes, k, head_dim, s, ahead)
            elif count == 3:
                _scores(3, 0, q, head_bytes, k, head_dim, s, ahead)
            elif count == 2:
                _scores(2, 0, q, head_bytes, k, head_dim, s, ahead)
            else:
                _scores(1, 0, q, head_bytes, k, head_dim, s, ahead)
            _softmax(row, count, first_position - start, group, scores, rescale, peaks, sums)
            o, r = mixed + row * head_bytes, rescale + row * 4
            if count == 4:
                _mix(4, 0, s, v, tokens, head_dim, r, o, ahead)
            elif count == 3:
                _mix(3, 0, s, v, tokens, head_dim, r, o, ahead)
            elif count == 2:
                _mix(2, 0, s, v, tokens, head_dim, r, o, ahead)
            else:
                _mix(1, 0, s, v, tokens, head_dim, r, o, ahead)
            row += count
    for position in range(num_positions):
        for member in range(group):
            row = position * group + member
            share = simd.splat_f32(ONE / simd.total(simd.load_f32(sums + row * 64)))
            target = out + position * out_stride + member * head_bytes
            for at in range(0, head_bytes, 64):
                simd.store_f32(target + at, simd.load_f32(mixed + row * head_bytes + at) * share)


@inline
def write_keys(source: int, head_dim: int, slot: int, target: int) -> None:
    """One row of a head into column `slot` of K's [head_dim][32]."""
    for dim in range(head_dim):
        simd.write_f16(target + (dim * BLOCK_TOKENS + slot) * 2, simd.read_f32(source + dim * 4))


@inline
def write_values(source: int, head_dim: int, slot: int, target: int) -> None:
    """One row of a head into row `slot` of V's [32][head_dim]."""
    for dim in range(0, head_dim, 16):
        simd.store_f16(target + (slot * head_dim + dim) * 2, simd.load_f32(source + dim * 4))
