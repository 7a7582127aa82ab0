"""Logits to tokens: one row, one token, whatever else is in the batch.

Randomness is counter-based: the draw for a row is a function of its seed and of the position the token will take, so
that it is the same alone, in any batch, on any worker, and when a lost step is computed again.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.kernels.sampling import cut, draw, weigh
from engine.protocol import SamplingParams, TokenLogprob

F32 = NDArray[np.float32]
Mask = NDArray[np.uint32]
"""One bit per token, the lowest of each word first; set: allowed."""

_GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: a division by them would leave nothing but the best token anyway."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is for.

    `position` is the place of the token to be drawn in its sequence, prompt included. `token_counts` counts the tokens
    generated before it, `prompt_token_set` holds the prompt's; both are read only when a penalty is set. `allowed` is
    what a grammar lets through, None where there is none; it comes after bias and penalties and before all else.
    """

    params: SamplingParams
    position: int
    token_counts: Mapping[int, int] | None = None
    prompt_token_set: Set[int] | None = None
    allowed: Mask | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn, and its log-probability where it was asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


def sample(logits: F32, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Draw one token for each row of `logits` [rows, vocabulary], which is left as it is.

    Raises ValueError when the numbers of rows differ, ArithmeticError when a row has no largest logit (NaN).
    """
    if len(rows) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} rows to sample")
    return [_sample_row(values, row) for values, row in zip(logits, rows, strict=True)]


def logprob_of(logits: F32, token_id: int, num_top: int) -> TokenLogprob:
    """Log-softmax of the raw logits, in float64, for the token and the best alternatives (equal ones by id).

    Raw means as the model gave them: before bias, penalties, grammar and temperature.
    """
    best = logits.max()
    log_total = float(best) + math.log(float(np.exp(logits - best).sum(dtype=np.float64)))
    top: list[tuple[int, float]] = []
    num_top = min(num_top, len(logits))
    if num_top:
        threshold = np.partition(logits, -num_top)[-num_top]
        ids = np.flatnonzero(logits >= threshold)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:num_top]
        top = [(int(i), float(logits[i]) - log_total) for i in ids]
    return TokenLogprob(token_id, float(logits[token_id]) - log_total, top)


def uniform(seed: int, position: int) -> float:
    """A number 0 ≤ u < 1 that is fixed by seed and position: a SplitMix64 stream per seed, read at `position`."""
    return (_mix(_mix(seed & _MASK) + (position + 1) * _GOLDEN & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _sample_row(logits: F32, row: SampleRow) -> Sampled:
    params = row.params
    values = _adjusted(logits, row)
    token_id = int(values.argmax())
    best = values[token_id]
    if not np.isfinite(best):
        raise ArithmeticError(f"the logits for position {row.position} have no largest value ({best})")
    if params.temperature >= _GREEDY_BELOW:
        token_id = _draw(values, best, row)
    logprob = None if params.logprobs is None else logprob_of(logits, token_id, params.logprobs)
    return Sampled(token_id, logprob)


def _adjusted(logits: F32, row: SampleRow) -> F32:
    """Logits after bias, penalties and grammar; the row itself where there are none."""
    values = _penalised(logits, row)
    if row.allowed is None:
        return values
    bits = np.unpackbits(row.allowed.view(np.uint8), count=len(values), bitorder="little")
    masked: F32 = np.where(bits.view(np.bool_), values, np.float32(-np.inf))
    return masked


def _penalised(logits: F32, row: SampleRow) -> F32:
    params = row.params
    counts = row.token_counts or {}
    has_penalty = bool(counts) and (params.presence_penalty != 0 or params.frequency_penalty != 0)
    has_repetition = params.repetition_penalty != 1 and bool(counts or row.prompt_token_set)
    if not (params.logit_bias or has_penalty or has_repetition):
        return logits
    values = logits.copy()
    for token_id, bias in params.logit_bias.items():
        # An id outside the vocabulary is never produced: there is nothing to bias.
        if 0 <= token_id < len(values):
            values[token_id] += np.float32(bias)
    if has_repetition:
        seen = np.fromiter(set(counts) | set(row.prompt_token_set or ()), np.int64)
        repeated = values[seen]
        factor = np.float32(params.repetition_penalty)
        values[seen] = np.where(repeated > 0, repeated / factor, repeated * factor)
    if has_penalty:
        ids = np.fromiter(counts.keys(), np.int64)
        times = np.fromiter(counts.values(), np.float32)
        values[ids] -= times * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    return values


def _draw(values: F32, best: np.float32, row: SampleRow) -> int:
    """Temperature, then min-p, top-k and top-p one after another, then the draw among what is left."""
    params = row.params
    below: F32 = (best - values) / np.float32(params.temperature)
    weights: F32 = np.empty_like(below)
    weigh(below.ctypes.data, len(below), weights.ctypes.data)
    last_below, last_id = math.inf, len(values)
    if params.min_p > 0:
        last_below = float(np.float32(-math.log(params.min_p)))
    if 0 < params.top_k < len(values):
        last_below, last_id = _cut(below, weights, False, params.top_k, last_below, last_id)
    if params.top_p < 1:
        last_below, last_id = _cut(below, weights, True, params.top_p, last_below, last_id)
    return int(draw(below, weights, last_below, last_id, uniform(params.seed, row.position)))


def _cut(
    below: F32, weights: F32, by_mass: bool, target: float, last_below: float, last_id: int
) -> tuple[float, int]:
    new_below, new_id = cut(below, weights, by_mass, float(target), last_below, last_id)
    return new_below, int(new_id)
