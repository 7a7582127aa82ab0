"""One engine step: a plan becomes one call of the model, and the logits become tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.model import StepBatch
from engine.sampler import Sampled, SampleRow, sample
from engine.scheduler import Plan, Slot
from engine.sequence import Sequence
from engine.speculation import accepted

Forward = Callable[[StepBatch], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a slot: the tokens that follow its known ones, none while its prompt is not through."""

    slot: Slot[Sequence]
    sampled: list[Sampled]


def run_step(forward: Forward, plan: Plan[Sequence]) -> list[Outcome]:
    """Compute a plan's rows and sample behind each sequence that is up to date; changes no sequence."""
    logits = forward(_batch(plan))
    rows = [row for slot in plan.slots for row in _sample_rows(slot)]
    sampled = sample(logits, rows) if rows else []
    outcomes = []
    at = 0
    for slot in plan.slots:
        count = _num_logits(slot)
        of_slot = sampled[at : at + count]
        at += count
        if slot.num_draft:
            drafts = slot.work.draft[: slot.num_draft]
            of_slot = of_slot[: 1 + accepted(drafts, [s.token_id for s in of_slot])]
        outcomes.append(Outcome(slot, of_slot))
    return outcomes


def _num_logits(slot: Slot[Sequence]) -> int:
    if slot.num_draft:
        return slot.num_rows
    return 1 if slot.work.num_computed + slot.num_rows == slot.work.num_tokens else 0


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
        logit_rows += range(end - _num_logits(slot), end)
    return StepBatch(
        tokens=tokens,
        query_start=query_start,
        first_position=np.array([slot.work.num_computed for slot in slots], np.int32),
        block_tables=block_tables,
        logit_rows=np.array(logit_rows, np.int32),
    )


def _sample_rows(slot: Slot[Sequence]) -> list[SampleRow]:
    work = slot.work
    return [
        SampleRow(
            params=work.sampling,
            position=work.num_tokens + offset,
            token_counts=work.generated_counts,
            prompt_token_set=work.prompt_set,
        )
        for offset in range(_num_logits(slot))
    ]
