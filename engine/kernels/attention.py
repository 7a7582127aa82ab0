"""Attention of a tile of queries over paged KV: exact integer products, softmax online, 64 tokens after 64 tokens.

Queries of all heads that share a KV head go together; each becomes 8-bit integers with one scale, so a score is an
exact integer times two floats. Softmax weights of a row's stretch of 64 tokens, times the scales of its values, become
8-bit integers of one scale, so what the stretch adds is again an exact integer times a float. Both scales are such that
two neighbours fit 8 bits together: then their products with bytes add up to 16 bits, which is what AVX2 can do.
Whoever computes the integers gets the same (`attention_dots.py`, `attention_tiles.py`), floats are a row's own and
stretches begin at position 0: a row gets the same bits in any tile and on any path.
"""

from typing import Any

import numpy as np

from engine.kernels import amx, simd
from engine.kernels.attention_products import mix, prepare, score, spare_bytes
from engine.kernels.isa import Isa
from engine.kernels.jit import inline, jit
from engine.kernels.kv import BLOCK_TOKENS, KEY_OFFSET, ZERO, scales_at
from engine.kernels.softmax import (
    LOWEST,
    NUMBERS_BYTES,
    SCORES_BYTES,
    STRETCH,
    VECTORS_BYTES,
    WEIGHTS_BYTES,
    join,
    of_neighbours,
    weigh,
)

TILE_POSITIONS = 16
ONE = np.float32(1.0)
MAX_QUERIES = np.float32(127.0)
"""Of two neighbours together, before they are rounded: 128 after that at most, and 128 · 255 is below 2**15."""


def scratch_bytes(group: int, head_dim: int) -> int:
    """Working memory of `attend` for one thread."""
    rows = -(-group * TILE_POSITIONS // 16) * 16
    lasting = rows * (4 * head_dim + 64 + head_dim + 3 * 4)
    of_a_group = SCORES_BYTES + WEIGHTS_BYTES + 2 * VECTORS_BYTES + 3 * NUMBERS_BYTES
    return lasting + of_a_group + 2 * 4 * STRETCH + spare_bytes(head_dim) + 64


@inline
def _quantise_query(source: int, head_dim: int, target: int) -> Any:
    """A query as a row of the products; its scale and what keys are raised by times the sum of its integers."""
    tops = simd.splat_f32(ZERO)
    for at in range(0, head_dim * 4, 64):
        tops = simd.larger(of_neighbours(simd.absolute(simd.load_f32(source + at))), tops)
    top = simd.largest(tops)
    factor = simd.splat_f32(MAX_QUERIES / top if top > ZERO else ZERO)
    total = simd.splat_i32(0)
    for dim in range(0, head_dim, 16):
        integers = simd.nearest(simd.load_f32(source + dim * 4) * factor)
        simd.store_i8(target + dim, integers)
        total = total + integers
    return top / MAX_QUERIES, simd.total_i32(total) * KEY_OFFSET


@inline
def _load_scales(
    first: int, second: int, num_tokens: int, target: int, ahead: int, ahead_second: int
) -> None:
    """The scales of a stretch's two blocks; 0 from `num_tokens` on, where memory may hold anything."""
    for part in range(4):
        source = (first if part < 2 else second) + part % 2 * 64
        simd.fetch(source + (ahead if part < 2 else ahead_second))
        scales = simd.load_f32(source)
        if num_tokens < STRETCH:
            scales = simd.keep_until(scales, num_tokens - 1 - part * 16, ZERO)
        simd.store_f32(target + part * 64, scales)


@jit
def attend(
    isa: Isa,
    configs: int,
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
    rows, head_floats = group * num_positions, head_dim * 4
    padded = (rows + 15) // 16 * 16
    mixed = (scratch + 63) // 64 * 64
    sums = mixed + padded * head_floats
    integers = sums + padded * 64
    offsets = integers + padded * head_dim
    factors, highest = offsets + padded * 4, offsets + padded * 8
    # What a group of 16 rows works with.
    scores = offsets + padded * 12
    weights = scores + SCORES_BYTES
    totals = weights + WEIGHTS_BYTES
    tops = totals + VECTORS_BYTES
    peaks = tops + VECTORS_BYTES
    shrinks, units = peaks + NUMBERS_BYTES, peaks + 2 * NUMBERS_BYTES
    key_scales = peaks + 3 * NUMBERS_BYTES
    value_scales = key_scales + STRETCH * 4
    spare, nothing = value_scales + STRETCH * 4, simd.splat_f32(ZERO)
    for row in range(rows):
        source = queries + row // group * query_stride + row % group * head_floats
        scale, offset = _quantise_query(source, head_dim, integers + row * head_dim)
        simd.write_f32(factors + row * 4, scale * simd.LOG2_E)
        simd.write_i32(offsets + row * 4, offset)
        simd.store_f32(sums + row * 64, nothing)
        for at in range(0, head_floats, 64):
            simd.store_f32(mixed + row * head_floats + at, nothing)
    for row in range(0, padded, 16):
        simd.store_f32(highest + row * 4, simd.splat_f32(LOWEST))
    amx.begin(isa, amx.FULL, configs)
    last_position = first_position + num_positions - 1
    last_block = last_position // BLOCK_TOKENS
    for start in range(0, last_position + 1, STRETCH):
        num_tokens = min(STRETCH, last_position - start + 1)
        block = start // BLOCK_TOKENS
        first = cache + simd.read_i32(table + block * 4) * block_bytes
        second = cache + simd.read_i32(table + min(block + 1, last_block) * 4) * block_bytes
        # A head's part of a block is too short for the hardware to see where the next one lies: two blocks on, and at
        # the end in the first blocks, where the next head's part is.
        last_round, next_part = block + 2 > last_block, scales_at(head_dim) + BLOCK_TOKENS * 4
        following = 0 if last_round else block + 2
        ahead = cache + simd.read_i32(table + following * 4) * block_bytes - first
        ahead_second = (
            cache + simd.read_i32(table + min(following + 1, last_block) * 4) * block_bytes - second
        )
        if last_round:
            ahead += next_part
            ahead_second += next_part
        for kind_at, scales in ((keys_at, key_scales), (values_at, value_scales)):
            at = kind_at + scales_at(head_dim)
            _load_scales(first + at, second + at, num_tokens, scales, ahead, ahead_second)
        # Rows that lie wholly before this stretch come first in the tile and are done.
        row = max(0, start - first_position) * group
        prepared = prepare(isa, rows - row, head_dim, first + values_at, second + values_at, spare)
        for base in range(row // 16 * 16, rows, 16):
            begin, end = max(row - base, 0), min(rows - base, 16)
            score(
                isa, prepared, begin, end, integers + base * head_dim, head_dim, first + keys_at, second + keys_at,
                num_tokens, scores, spare, ahead, ahead_second,
            )  # fmt: skip
            weigh(
                begin, end, (first_position - start) * group + base, group, scores, offsets + base * 4,
                factors + base * 4, key_scales, value_scales, weights, totals, tops, peaks, units,
            )  # fmt: skip
            join(begin, end, peaks, highest + base * 4, shrinks, units, totals, sums + base * 64)
            mix(
                isa, prepared, begin, end, weights, head_dim, first + values_at, second + values_at, num_tokens,
                shrinks, units, mixed + base * head_floats, spare, ahead, ahead_second,
            )  # fmt: skip
    amx.end(isa)
    for row in range(rows):
        share = simd.splat_f32(ONE / simd.total(simd.load_f32(sums + row * 64)))
        target = out + row // group * out_stride + row % group * head_floats
        for at in range(0, head_floats, 64):
            simd.store_f32(target + at, simd.load_f32(mixed + row * head_floats + at) * share)
