"""Which workers serve a request: filter, score in [0, 1], pick; the reason is kept (pure: no IO, no clock).

prefill and decode worker found   disaggregated: KV goes through the pool
the same `both` worker is best    aggregated: nothing moves
no prefill worker                 aggregated on a decode worker, which computes the prompt itself
no decode worker                  aggregated on a prefill worker, which goes on to decode
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from app.routing.scorers import (
    Candidate,
    batch_score,
    link_score,
    local_score,
    memory_score,
    queue_score,
)
from engine.protocol import Role

Mode = Literal["disaggregated", "aggregated", "decode_worker_alone", "prefill_worker_alone"]

PREFILL_WEIGHTS = {"queue": 0.6, "local": 0.4}
DECODE_WEIGHTS = {"batch": 0.5, "memory": 0.2, "link": 0.3}
_MODE_OF_ONE: dict[Role, Mode] = {
    "both": "aggregated",
    "decode": "decode_worker_alone",
    "prefill": "prefill_worker_alone",
}
MAX_REASONS = 8
"""Candidates of each side whose scores are kept with a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a route is wanted for. `num_local_tokens`: by worker, prompt tokens whose KV it computed lately."""

    model: str
    num_prompt_tokens: int
    kv_bytes_per_token: int = 0
    num_local_tokens: Mapping[str, int] = field(default_factory=dict)
    avoid: Collection[str] = ()
    """Workers that failed this request already."""


class Scored(msgspec.Struct, frozen=True):
    """One candidate's scores by scorer, and their weighted sum."""

    worker: str
    score: float
    scores: dict[str, float]


class Reason(msgspec.Struct, frozen=True):
    """Why a route is what it is. `excluded`: worker to the filter that dropped it."""

    mode: Mode
    prefill: list[Scored]
    decode: list[Scored]
    excluded: dict[str, str]


class Route(msgspec.Struct, frozen=True):
    """The decision. `prefill_worker` is None when one worker does everything."""

    prefill_worker: str | None
    decode_worker: str
    reason: Reason


def why_unfit(worker: Candidate, demand: Demand) -> str | None:
    """The first filter that drops a worker, or None when it may serve."""
    if worker.model != demand.model:
        return "serves another model"
    if not worker.is_connected:
        return "not connected"
    if worker.state != "ready":
        return worker.state
    if worker.worker_id in demand.avoid:
        return "failed this request before"
    if worker.max_context_tokens < demand.num_prompt_tokens:
        return "context too short"
    return None


def route(workers: Sequence[Candidate], demand: Demand) -> Route | None:
    """The best route now, or None when no worker is fit."""
    excluded: dict[str, str] = {}
    fit: list[Candidate] = []
    for worker in workers:
        why = why_unfit(worker, demand)
        if why is None:
            fit.append(worker)
        else:
            excluded[worker.worker_id] = why
    by_id = {worker.worker_id: worker for worker in fit}
    prefill = _ranked(
        PREFILL_WEIGHTS,
        {
            worker.worker_id: {
                "queue": queue_score(worker),
                "local": local_score(
                    demand.num_local_tokens.get(worker.worker_id, 0), demand.num_prompt_tokens
                ),
            }
            for worker in fit
            if worker.role != "decode"
        },
    )
    source = by_id[prefill[0].worker] if prefill else None
    num_bytes = demand.num_prompt_tokens * demand.kv_bytes_per_token
    decode = _ranked(
        DECODE_WEIGHTS,
        {
            worker.worker_id: {
                "batch": batch_score(worker),
                "memory": memory_score(worker),
                "link": link_score(source, worker, num_bytes),
            }
            for worker in fit
            if worker.role != "prefill"
        },
    )
    if not prefill and not decode:
        return None
    prefill_worker = prefill[0].worker if prefill else None
    decode_worker = decode[0].worker if decode else prefill[0].worker
    mode: Mode = "disaggregated"
    if prefill_worker is None or prefill_worker == decode_worker:
        prefill_worker, mode = None, _MODE_OF_ONE[by_id[decode_worker].role]
    reason = Reason(mode, prefill[:MAX_REASONS], decode[:MAX_REASONS], excluded)
    return Route(prefill_worker, decode_worker, reason)


def _ranked(weights: Mapping[str, float], scores: Mapping[str, dict[str, float]]) -> list[Scored]:
    ranked = [
        Scored(
            worker,
            round(sum(weights[name] * value for name, value in views.items()), 6),
            {name: round(value, 6) for name, value in views.items()},
        )
        for worker, views in scores.items()
    ]
    ranked.sort(key=lambda scored: (-scored.score, scored.worker))
    return ranked
