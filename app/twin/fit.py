"""Solves for the twin's parameters: six published rows, six numbers, no row used twice.

The order matters: each step needs only what came before, so every number answers to exactly one row (the two
of decode answer to two rows together).
"""

from collections.abc import Callable
from dataclasses import replace

from app.twin.decode import DecodePoint
from app.twin.parameters import PUBLISHED, Parameters
from app.twin.prefill import PrefillPoint

BALANCED_BATCH_S = 2.512
"""Prefill of 16,384 tokens per NPU at 4K, experts balanced (vendor's public DeepSeek-R1 recipe, same chip).
"""
TOKENS_PER_RANK = 8192
DEFAULT_TOKENS_PER_S = 5655.0
REUSE_SPEEDUP_90 = 2.28
TPOT_96_S = 49.4e-3
TPOT_8_S = 14.9e-3
CONTEXT_4K = 4096 + 256 / 2


def fit(start: Parameters = PUBLISHED) -> Parameters:
    """The parameters that reproduce the six calibrated rows."""

    def batch_s(found: Parameters, *, imbalanced: bool, reuse: float = 0.0) -> float:
        return PrefillPoint(
            tokens_per_rank=TOKENS_PER_RANK,
            prompt_tokens=4096,
            imbalanced=imbalanced,
            reuse=reuse,
            parameters=found,
        ).batch_s()

    found = start
    found = replace(
        found,
        prefill_inflation=_solve(
            lambda x: batch_s(replace(found, prefill_inflation=x), imbalanced=False) - BALANCED_BATCH_S, 1, 4
        ),
    )
    balanced = found
    found = replace(
        balanced,
        imbalance=_solve(
            lambda x: (
                2 * TOKENS_PER_RANK / batch_s(replace(balanced, imbalance=x), imbalanced=True)
                - DEFAULT_TOKENS_PER_S
            ),
            1,
            3,
        ),
    )
    skewed = found
    whole_s = batch_s(skewed, imbalanced=True)
    found = replace(
        skewed,
        reuse_gain=_solve(
            lambda x: (
                whole_s / batch_s(replace(skewed, reuse_gain=x), imbalanced=True, reuse=0.9)
                - REUSE_SPEEDUP_90
            ),
            0,
            1,
        ),
    )
    return _fit_decode(found)


def _fit_decode(start: Parameters) -> Parameters:
    def tpot_s(found: Parameters, batch: int) -> float:
        return DecodePoint(batch_per_rank=batch / 2, context_tokens=CONTEXT_4K, parameters=found).tpot_s()

    def with_inflation(inflation: float) -> Parameters:
        fixed = replace(start, decode_inflation=inflation)
        pass_s = _solve(lambda x: tpot_s(replace(fixed, decode_pass_s=x), 8) - TPOT_8_S, 0, 300e-6)
        return replace(fixed, decode_pass_s=pass_s)

    return with_inflation(_solve(lambda x: tpot_s(with_inflation(x), 96) - TPOT_96_S, 1, 1.6))


def _solve(error: Callable[[float], float], low: float, high: float) -> float:
    """The root of a monotone function, by bisection."""
    sign = 1.0 if error(high) > error(low) else -1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sign * error(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
