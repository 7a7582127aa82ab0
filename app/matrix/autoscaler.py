"""MatrixCompute, the P/D half (pure): when a worker should turn from prefill to decode or back.

    pressure = what a side takes over what it may take (1: its target is just met)

    prefill   the slower of recent TTFT and the wait that its queued tokens mean, over the TTFT target
    decode    recent TPOT over its target; KV memory in use over what is healthy; sequences that wait for room

A side above 1 is helped by one worker of the other side, if that side would stay well below 1 with one worker less,
if this has been so for a while, and if the last change is long enough ago to have shown its effect. One worker at a
time: a change drains a worker, which costs. No IO, no clock: `now` comes with what was observed, so the gateway's loop
and the digital twin run the same decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.protocol import Role, WorkerState

Side = Literal["prefill", "decode"]

EVERY_S = 1.0
"""Between two looks."""
RECENT_S = 10.0
"""Requests that got their first token, or ended, longer ago no longer tell how the service is."""
MIN_TOKENS = 8
"""Tokens after which a running answer's pace counts."""
SLOW_SHARE = 0.9
"""TTFT and TPOT are judged by this quantile: a target is for nearly everyone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Targets, and how calm the decision is. Raises ValueError naming a value that makes no sense."""

    ttft_target_s: float = 2.0
    tpot_target_s: float = 0.05
    spare_pressure: float = 0.7
    """Pressure that the giving side may have after it gave: the gap up to 1 keeps workers from turning to and fro."""
    sustain_s: float = 3.0
    """How long one side must lack while the other can spare."""
    cooldown_s: float = 15.0
    """Rest after a change, so that its effect is seen before the next."""
    healthy_kv_share: float = 0.9
    min_workers: int = 1
    """Of each side; workers that do both count for both."""

    def __post_init__(self) -> None:
        for name in ("ttft_target_s", "tpot_target_s", "spare_pressure", "healthy_kv_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
        if self.spare_pressure >= 1:
            raise ValueError(
                f"spare_pressure: {self.spare_pressure} must be below 1, or workers turn to and fro"
            )
        for name in ("sustain_s", "cooldown_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if self.min_workers < 1:
            raise ValueError(f"min_workers: {self.min_workers} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A worker as the decision sees it. `num_queued_tokens`: prompt tokens that it has still to compute."""

    worker_id: str
    role: Role
    state: WorkerState
    num_running: int
    num_waiting: int
    num_queued_tokens: int
    kv_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is known at `now`. `ttft_s`, `tpot_s`: of recent requests, waiting ones included; None: there were none.

    `prefill_tokens_per_s`: of one prefill worker at work; None until it was seen.
    """

    now: float
    workers: Sequence[WorkerLoad]
    ttft_s: float | None = None
    tpot_s: float | None = None
    prefill_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What the next decision must know of the last ones."""

    starved: Side | None = None
    starved_since: float | None = None
    changed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Let this worker take that role; `reason` is for the log."""

    worker_id: str
    role: Side
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now (`change` None: nothing), why, and what to remember. Counts are those after the change."""

    change: Change | None
    memory: Memory
    prefill_pressure: float
    decode_pressure: float
    num_workers: dict[Side, int] = field(default_factory=dict)


def decide(policy: Policy, memory: Memory, seen: Observation) -> Decision:
    """One decision. Nothing changes while a worker is starting or draining: capacity is on its way already."""
    sides: dict[Side, list[WorkerLoad]] = {"prefill": [], "decode": []}
    for worker in seen.workers:
        for side, others in (("prefill", "decode"), ("decode", "prefill")):
            if worker.state == "ready" and worker.role != others:
                sides[side].append(worker)  # type: ignore[index]  # the two literals above
    pressure: dict[Side, float] = {
        "prefill": prefill_pressure(policy, seen, sides["prefill"]),
        "decode": decode_pressure(policy, seen, sides["decode"]),
    }
    counts = {side: len(workers) for side, workers in sides.items()}
    starved = _starved(policy, pressure, counts)
    since = memory.starved_since if starved is not None and starved == memory.starved else seen.now
    memory = Memory(starved, since if starved is not None else None, memory.changed_at)
    change = None
    if starved is not None and _may_act(policy, memory, seen):
        giving: Side = "decode" if starved == "prefill" else "prefill"
        given = [worker for worker in sides[giving] if worker.role == giving]
        if given:
            # The one that is empty soonest; of equals the one that came last.
            least = min(given, key=lambda w: (w.num_running + w.num_waiting, w.num_queued_tokens))
            chosen = max((w for w in given if _busy(w) == _busy(least)), key=lambda w: w.worker_id)
            reason = f"{starved} at {pressure[starved]:.2f} of its target, {giving} at {pressure[giving]:.2f}"
            change = Change(chosen.worker_id, starved, reason)
            memory = Memory(None, None, seen.now)
            counts[starved] += 1
            counts[giving] -= 1
    return Decision(change, memory, pressure["prefill"], pressure["decode"], counts)


def slow(values: Sequence[float]) -> float | None:
    """The TTFT or TPOT that stands for a service in which these were seen; None when there were none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(SLOW_SHARE * len(ordered)))]


def prefill_pressure(policy: Policy, seen: Observation, workers: Sequence[WorkerLoad]) -> float:
    """Recent or coming TTFT over its target."""
    waited_s = seen.ttft_s or 0.0
    queued = sum(worker.num_queued_tokens for worker in workers)
    coming_s = 0.0
    if queued and seen.prefill_tokens_per_s:
        coming_s = queued / (seen.prefill_tokens_per_s * max(1, len(workers)))
    return max(waited_s, coming_s) / policy.ttft_target_s


def decode_pressure(policy: Policy, seen: Observation, workers: Sequence[WorkerLoad]) -> float:
    """Recent TPOT over its target, or how crowded the decode workers' memory is."""
    pace = (seen.tpot_s or 0.0) / policy.tpot_target_s
    if not workers:
        return pace
    full = sum(worker.kv_share for worker in workers) / len(workers) / policy.healthy_kv_share
    # A worker that prefills, too, has prompts waiting; only on decode workers a waiting sequence means lack of room.
    waiting = sum(worker.num_waiting for worker in workers if worker.role == "decode")
    running = sum(worker.num_running for worker in workers)
    return max(pace, full, 1 + waiting / max(1, running) if waiting else 0.0)


def _starved(policy: Policy, pressure: dict[Side, float], counts: dict[Side, int]) -> Side | None:
    """The side that lacks what the other can spare."""
    pairs: tuple[tuple[Side, Side], ...] = (("prefill", "decode"), ("decode", "prefill"))
    for side, other in pairs:
        if pressure[side] > 1 and counts[other] > policy.min_workers:
            left_with = pressure[other] * counts[other] / (counts[other] - 1)
            if left_with <= policy.spare_pressure:
                return side
    return None


def _may_act(policy: Policy, memory: Memory, seen: Observation) -> bool:
    if any(worker.state != "ready" for worker in seen.workers):
        return False
    if memory.changed_at is not None and seen.now - memory.changed_at < policy.cooldown_s:
        return False
    return memory.starved_since is not None and seen.now - memory.starved_since >= policy.sustain_s


def _busy(worker: WorkerLoad) -> tuple[int, int]:
    return worker.num_running + worker.num_waiting, worker.num_queued_tokens
