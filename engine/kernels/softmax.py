"""Softmax online: scores of 16 rows and a stretch of 64 tokens become integer weights of the tokens' values.

In three passes over the rows: what a row waits for, its largest score and then its largest weight, is found for all
rows at once in between.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels import simd
from engine.kernels.jit import inline, intrinsic, types
from engine.kernels.kv import BLOCK_TOKENS, ZERO
from engine.kernels.simd import F32, I32, LANES

Builder = Any
STRETCH = 2 * BLOCK_TOKENS
"""Tokens whose weights share a scale: two blocks."""
LOWEST = np.float32(-3e38)
MAX_WEIGHTS = np.float32(255.0)
"""Of two neighbours together, before they are rounded: 256 · 127 is below 2**15."""
SCORES_BYTES, WEIGHTS_BYTES, VECTORS_BYTES, NUMBERS_BYTES = 16 * STRETCH * 4, 16 * STRETCH, 16 * 64, 16 * 4
"""Of 16 rows: scores; weights; a vector of 16 floats each; one number each."""
_FOLDS = (
    ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
    ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
)
"""Which lanes of two vectors of 8 are compared to leave one such vector, half of its lanes from each of the two; after
all three the largest of each of eight vectors is left, in their order."""


@intrinsic
def _largest_of_rows(context: Any, address: Any) -> Any:
    """The largest lane of each of 16 vectors of 16 floats, which lie one after another."""

    def codegen(_c: Any, b: Builder, _s: Any, args: Any) -> Any:
        eight = ir.VectorType(F32, 8)

        def fold(first: Any, second: Any, lanes: Any) -> Any:
            left, right = (
                b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, 8), order)) for order in lanes
            )
            return simd.larger_ir(b, left, right)

        found = []
        for row in range(LANES):
            at = simd.offset(b, args[0], 64 * row)
            found.append(
                simd.larger_ir(b, simd.load(b, at, eight), simd.load(b, simd.offset(b, at, 32), eight))
            )
        for lanes in _FOLDS:
            found = [fold(*found[index : index + 2], lanes) for index in range(0, len(found), 2)]
        return b.shuffle_vector(*found, ir.Constant(simd.I32_LANES, list(range(LANES))))

    return simd.f32x16(types.int64), codegen


@inline
def of_neighbours(x: Any) -> Any:
    """The sum of each lane and its neighbour."""
    return x + simd.swap_pairs(x)


@inline
def _scale(row: int, last: int, scores: int, offsets: int, key_scales: int, tops: int) -> None:
    """A row's integers to floats, LOWEST beyond the token `last`."""
    offset, at = simd.splat_i32(simd.read_i32(offsets + row * 4)), scores + row * 256
    s0 = simd.as_f32(simd.load_i32(at) - offset) * simd.load_f32(key_scales)
    s1 = simd.as_f32(simd.load_i32(at + 64) - offset) * simd.load_f32(key_scales + 64)
    s2 = simd.as_f32(simd.load_i32(at + 128) - offset) * simd.load_f32(key_scales + 128)
    s3 = simd.as_f32(simd.load_i32(at + 192) - offset) * simd.load_f32(key_scales + 192)
    if last < STRETCH - 1:
        s0, s1 = simd.keep_until(s0, last, LOWEST), simd.keep_until(s1, last - 16, LOWEST)
        s2, s3 = simd.keep_until(s2, last - 32, LOWEST), simd.keep_until(s3, last - 48, LOWEST)
    simd.store_f32(at, s0)
    simd.store_f32(at + 64, s1)
    simd.store_f32(at + 128, s2)
    simd.store_f32(at + 192, s3)
    simd.store_f32(tops + row * 64, simd.larger(simd.larger(s0, s1), simd.larger(s2, s3)))


@inline
def _exponentiate(
    row: int, last: int, scores: int, levels: int, factors: int, value_scales: int, totals: int, tops: int
) -> None:
    """A row's scores to weights and their sums by lanes; then times the scales of their values, and the largest two
    neighbours by lanes."""
    level, factor = (
        simd.splat_f32(simd.read_f32(levels + row * 4)),
        simd.splat_f32(simd.read_f32(factors + row * 4)),
    )
    at = scores + row * 256
    w0 = simd.exp2((simd.load_f32(at) - level) * factor)
    w1 = simd.exp2((simd.load_f32(at + 64) - level) * factor)
    w2 = simd.exp2((simd.load_f32(at + 128) - level) * factor)
    w3 = simd.exp2((simd.load_f32(at + 192) - level) * factor)
    if last < STRETCH - 1:
        # Not by their scores alone: a query of zeros gives every token the same.
        w0, w1 = simd.keep_until(w0, last, ZERO), simd.keep_until(w1, last - 16, ZERO)
        w2, w3 = simd.keep_until(w2, last - 32, ZERO), simd.keep_until(w3, last - 48, ZERO)
    simd.store_f32(totals + row * 64, (w0 + w1) + (w2 + w3))
    w0, w1 = w0 * simd.load_f32(value_scales), w1 * simd.load_f32(value_scales + 64)
    w2, w3 = w2 * simd.load_f32(value_scales + 128), w3 * simd.load_f32(value_scales + 192)
    simd.store_f32(at, w0)
    simd.store_f32(at + 64, w1)
    simd.store_f32(at + 128, w2)
    simd.store_f32(at + 192, w3)
    half, other = (
        simd.larger(of_neighbours(w0), of_neighbours(w1)),
        simd.larger(of_neighbours(w2), of_neighbours(w3)),
    )
    simd.store_f32(tops + row * 64, simd.larger(half, other))


@inline
def _round(row: int, scores: int, scales: int, weights: int) -> None:
    """A row's weights to integers."""
    scale, at, target = (
        simd.splat_f32(simd.read_f32(scales + row * 4)),
        scores + row * 256,
        weights + row * STRETCH,
    )
    simd.store_i8(target, simd.nearest(simd.load_f32(at) * scale))
    simd.store_i8(target + 16, simd.nearest(simd.load_f32(at + 64) * scale))
    simd.store_i8(target + 32, simd.nearest(simd.load_f32(at + 128) * scale))
    simd.store_i8(target + 48, simd.nearest(simd.load_f32(at + 192) * scale))


@inline
def weigh(
    begin: int, end: int, row: int, group: int, scores: int, offsets: int, factors: int, key_scales: int,
    value_scales: int, weights: int, totals: int, tops: int, peaks: int, units: int,
) -> None:  # fmt: skip
    """Rows begin..end of 16: scores of a stretch to integer weights of its values; their peaks, sums by lanes and what
    1 stands for.

    Row 0 sees the tokens up to that of position (`row` / `group`) of the stretch, and so on. `tops`: working memory.
    """
    # Rows that see all of the stretch come last.
    whole = (row + begin) // group >= STRETCH - 1
    for each in range(begin, end):
        _scale(each, STRETCH - 1 if whole else (row + each) // group, scores, offsets, key_scales, tops)
    levels = _largest_of_rows(tops)
    # Where `units` will be, for the time being.
    simd.store_f32(units, levels)
    simd.store_f32(peaks, levels * simd.load_f32(factors))
    for each in range(begin, end):
        last = STRETCH - 1 if whole else (row + each) // group
        _exponentiate(each, last, scores, units, factors, value_scales, totals, tops)
    top, most = _largest_of_rows(tops), simd.splat_f32(MAX_WEIGHTS)
    simd.store_f32(tops, simd.where_positive(top, simd.quotient(most, top)))
    simd.store_f32(units, simd.quotient(top, most))
    for each in range(begin, end):
        _round(each, scores, tops, weights)


@inline
def join(
    begin: int, end: int, peaks: int, highest: int, shrinks: int, units: int, totals: int, sums: int
) -> None:
    """The stretch's softmax with that of the tokens before: how both shrink, and the new sums."""
    here, before = simd.load_f32(peaks), simd.load_f32(highest)
    level = simd.larger(here, before)
    simd.store_f32(highest, level)
    simd.store_f32(shrinks, simd.exp2(before - level))
    # From here on `peaks` holds how the stretch shrinks.
    share = simd.exp2(here - level)
    simd.store_f32(peaks, share)
    simd.store_f32(units, simd.load_f32(units) * share)
    for row in range(begin, end):
        shrink, share_of_row = simd.read_f32(shrinks + row * 4), simd.read_f32(peaks + row * 4)
        old = simd.load_f32(sums + row * 64) * simd.splat_f32(shrink)
        total = simd.load_f32(totals + row * 64)
        simd.store_f32(sums + row * 64, simd.fma(total, simd.splat_f32(share_of_row), old))
