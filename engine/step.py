"""One engine step: a plan becomes one call of the model, and the logits become tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.grammar import Mask, Masks
from engine.model import StepBatch
from engine.protocol import TokenLogprob
from engine.sampler import Sampled, SampleRow, logprob_of, sample
from engine.scheduler import Plan, Slot
from engine.sequence import Sequence
from engine.speculation import accepted

Forward = Callable[[StepBatch], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class StepError:
    """Why one sequence cannot go on, while the others of its step do."""

    code: Literal["invalid", "internal"]
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a slot.

    `sampled`: the tokens that follow its known ones, none while its prompt is not through. `scored`: log-probabilities
    of the prompt's tokens behind the slot's rows, where they were asked for. `error`: its grammar gave
    up, or its logits are no numbers.
    """

    slot: Slot[Sequence]
    sampled: list[Sampled]
    scored: list[TokenLogprob]
    error: StepError | None = None


def run_step(forward: Forward, plan: Plan[Sequence], masks: Masks) -> list[Outcome]:
    """Compute a plan's rows and sample behind each sequence that is up to date; changes no sequence.

    The masks of grammars are computed meanwhile.
    """
    constrained = [slot for slot in plan.slots if slot.work.matcher is not None and _num_sampled(slot)]
    masks_when_done = masks.begin([(m, _drafts(slot)) for slot in constrained if (m := slot.work.matcher)])
    logits = forward(_batch(plan))
    allowed = dict(zip(constrained, _split(masks_when_done(), constrained), strict=True))
    outcomes = []
    at = 0
    for slot in plan.slots:
        num_scored, num_sampled = _num_scored(slot), _num_sampled(slot)
        scored = _score(slot, logits[at : at + num_scored])
        at += num_scored
        outcomes.append(_sample(slot, logits[at : at + num_sampled], allowed.get(slot), scored))
        at += num_sampled
    return outcomes


def _sample(
    slot: Slot[Sequence],
    logits: npt.NDArray[np.float32],
    allowed: Mask | None,
    scored: list[TokenLogprob],
) -> Outcome:
    matcher = slot.work.matcher
    if matcher is not None and allowed is not None:
        error = matcher.error or (None if allowed.any(axis=1).all() else "no token fits it")
        if error is not None:
            message = f"its grammar cannot be followed further: {error}"
            return Outcome(slot, [], scored, StepError("invalid", message))
    try:
        sampled = sample(logits, _sample_rows(slot, allowed))
    except ArithmeticError as damage:
        return Outcome(slot, [], scored, StepError("internal", f"the engine failed: {damage}"))
    if slot.num_draft:
        sampled = sampled[: 1 + accepted(_drafts(slot), [s.token_id for s in sampled])]
    return Outcome(slot, sampled, scored)


def _score(slot: Slot[Sequence], logits: npt.NDArray[np.float32]) -> list[TokenLogprob]:
    first, num_top = slot.work.num_computed + 1, slot.work.sampling.prompt_logprobs or 0
    return [logprob_of(row, slot.work.tokens[first + i], num_top) for i, row in enumerate(logits)]


def _split(masks: Mask, slots: list[Slot[Sequence]]) -> list[Mask]:
    ends = np.cumsum([1 + slot.num_draft for slot in slots])
    return np.split(masks, ends[:-1]) if slots else []


def _drafts(slot: Slot[Sequence]) -> list[int]:
    return slot.work.draft[: slot.num_draft]


def _num_sampled(slot: Slot[Sequence]) -> int:
    """Rows at the slot's end behind which a token is drawn."""
    if slot.num_draft:
        return slot.num_rows
    return 1 if slot.work.num_computed + slot.num_rows == slot.work.num_tokens else 0


def _num_scored(slot: Slot[Sequence]) -> int:
    """Rows at the slot's beginning behind which a token of the prompt stands whose log-probability is wanted."""
    work = slot.work
    return min(slot.num_rows, work.num_prompt - 1 - work.num_computed) if work.computes_all else 0


def _batch(plan: Plan[Sequence]) -> StepBatch:
    slots = plan.slots
    num_rows = [slot.num_rows for slot in slots]
    query_start = np.zeros(len(slots) + 1, np.int32)
    np.cumsum(num_rows, out=query_start[1:])
    tokens = np.empty(query_start[-1], np.int32)
    block_tables = np.zeros((len(slots), max(len(slot.work.blocks) for slot in slots)), np.int32)
    logit_rows: list[int] = []
    for index, slot in enumerate(slots):
        work = slot.work
        begin, end = int(query_start[index]), int(query_start[index + 1])
        known = end - slot.num_draft
        tokens[begin:known] = work.tokens[work.num_computed : work.num_computed + known - begin]
        tokens[known:end] = work.draft[: slot.num_draft]
        block_tables[index, : len(work.blocks)] = work.blocks
        logit_rows += range(begin, begin + _num_scored(slot))
        logit_rows += range(end - _num_sampled(slot), end)
    return StepBatch(
        tokens=tokens,
        query_start=query_start,
        first_position=np.array([slot.work.num_computed for slot in slots], np.int32),
        block_tables=block_tables,
        logit_rows=np.array(logit_rows, np.int32),
    )


def _sample_rows(slot: Slot[Sequence], allowed: Mask | None) -> list[SampleRow]:
    work = slot.work
    return [
        SampleRow(
            params=work.sampling,
            position=work.num_tokens + offset,
            token_counts=work.generated_counts,
            prompt_token_set=work.prompt_set,
            allowed=None if allowed is None else allowed[offset],
        )
        for offset in range(_num_sampled(slot))
    ]
