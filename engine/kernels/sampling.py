"""Kernels of the sampler over one row of logits: which tokens stay in the draw, and the draw.

A row comes as `below`: how far each token's logit, over temperature, lies below the best one (0 for that, infinity for
the impossible). Tokens are ordered by it, equal ones by id. What stays in the draw is always a beginning of that
order, so a filter is one `Cut`: the last token that stays. Nothing is sorted but the few tokens around a cut.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from engine.kernels import simd
from engine.kernels.jit import Signature, jit

F32 = NDArray[np.float32]

HELD = np.float32(2.0**-126)
_BUCKETS_PER_UNIT = 8
_NUM_BUCKETS = 32 * _BUCKETS_PER_UNIT + 1
"""Tokens more than 32 below the best (e**-32 as likely) share the last bucket."""


@jit
def weigh(below: int, count: int, weights: int) -> None:
    """e**-below of `count` floats from one address to another: NumPy's own differ in their last bits by machine.

    Less than 2**-102 loses 2**-126, at which the kernel's power of two is held: nothing is left of the impossible.
    """
    whole, per_unit, held = count // 16 * 16, simd.splat_f32(-simd.LOG2_E), simd.splat_f32(HELD)
    for at in range(0, whole * 4, 64):
        simd.store_f32(weights + at, simd.exp2(simd.load_f32(below + at) * per_unit) - held)
    for at in range(whole * 4, count * 4, 4):
        lanes = simd.exp2(simd.splat_f32(simd.read_f32(below + at)) * per_unit) - held
        simd.write_f32(weights + at, simd.largest(lanes))


@jit
def cut(
    below: F32, weights: F32, by_mass: bool, target: float, last_below: float, last_id: int
) -> tuple[float, float]:
    """The shortest beginning of the order that reaches `target`, within the earlier cut (last_below, last_id).

    The measure is `by_mass` the share of the weights within the earlier cut, else the number of tokens.
    Returns the new cut (below, id); the earlier one where the target is not reached.
    """
    measure = np.zeros(_NUM_BUCKETS)
    for i in range(below.size):
        if below[i] < last_below or (below[i] == last_below and i <= last_id):
            bucket = min(int(min(below[i], np.float32(32)) * _BUCKETS_PER_UNIT), _NUM_BUCKETS - 1)
            measure[bucket] += weights[i] if by_mass else 1.0
    if by_mass:
        target *= measure.sum()
    reached = 0.0
    crossing = 0
    while crossing < _NUM_BUCKETS and reached + measure[crossing] < target:
        reached += measure[crossing]
        crossing += 1
    if crossing == _NUM_BUCKETS:
        return float(last_below), float(last_id)
    count = 0
    ids = np.empty(below.size, np.int64)
    for i in range(below.size):
        bucket = min(int(min(below[i], np.float32(32)) * _BUCKETS_PER_UNIT), _NUM_BUCKETS - 1)
        if bucket == crossing and (below[i] < last_below or (below[i] == last_below and i <= last_id)):
            ids[count] = i
            count += 1
    # Ids come in rising order and the sort is stable: equal logits stay in order of id.
    ids = ids[:count][np.argsort(below[ids[:count]], kind="mergesort")]
    for token in ids:
        reached += weights[token] if by_mass else 1.0
        if reached >= target:
            return float(below[token]), float(token)
    return float(below[ids[-1]]), float(ids[-1])


@jit
def draw(below: F32, weights: F32, last_below: float, last_id: int, uniform: float) -> int:
    """The token at `uniform` (0 ≤ u < 1) of the cumulative weight, by id, of the tokens within the cut."""
    total = 0.0
    for i in range(below.size):
        if below[i] < last_below or (below[i] == last_below and i <= last_id):
            total += weights[i]
    target = uniform * total
    reached = 0.0
    chosen = -1
    for i in range(below.size):
        if weights[i] > 0 and (below[i] < last_below or (below[i] == last_below and i <= last_id)):
            reached += weights[i]
            chosen = i
            if reached > target:
                break
    return chosen


_ROW = types.float32[::1]

WANTED: list[tuple[Callable[..., Any], Signature]] = [
    (weigh, (types.int64, types.int64, types.int64)),
    (cut, (_ROW, _ROW, types.boolean, types.float64, types.float64, types.int64)),
    (draw, (_ROW, _ROW, types.float64, types.int64, types.float64)),
]
"""What to compile before the first request, for `compile_all`."""
