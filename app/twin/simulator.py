"""A supernode serving a trace, event by event on virtual time, decided by the live code.

    arrival -> route -> (pool) -> prefill steps -> handover -> decode stretches -> done

`app.routing.router.route` chooses the workers, `engine.scheduler.Scheduler` plans every step,
`memory_pool.eviction.LruIndex` decides what the pool keeps. The clock belongs to the heap: nothing here reads
another. With the same requests, machine and seed the result is the same to the last digit.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from random import Random
from typing import Any

from app.routing.router import Demand, route
from app.routing.scorers import Candidate
from app.twin.instance import DecodeInstance, Job, PrefillInstance, block_keys
from app.twin.machine import Machine
from app.twin.pool import TwinPool
from app.twin.trace import Request
from engine.protocol import Location
from engine.scheduler import Plan

MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Instances and their limits. `failures`: (instant, prefill instance number) of instances that break."""

    prefill_instances: int
    decode_instances: int
    max_running_per_decode: int
    prefill_npus: int
    decode_npus: int
    pool_bytes: float | None = None
    failures: tuple[tuple[float, int], ...] = ()
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of the requests, and the totals of the run."""

    jobs: list[Job] = field(default_factory=list)
    now: float = 0.0
    num_events: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    loaded_bytes: int = 0
    handed_over_bytes: int = 0
    handover_s: float = 0.0
    pool_evictions: int = 0
    num_preempted: int = 0
    prefill_busy_share: list[float] = field(default_factory=list)
    decode_busy_share: list[float] = field(default_factory=list)
    mean_decode_sequences: list[float] = field(default_factory=list)
    flows: dict[tuple[int, int], int] = field(default_factory=dict)
    """Handed-over bytes by (prefill instance, decode instance)."""


class Simulator:
    """One run. `run()` may be called once."""

    def __init__(self, machine: Machine, deployment: Deployment) -> None:
        self.machine = machine
        self.deployment = deployment
        self.pool = TwinPool(machine.kv_bytes_per_token * machine.block_tokens, deployment.pool_bytes)
        self.prefill = [PrefillInstance(machine) for _ in range(deployment.prefill_instances)]
        self.decode = [
            DecodeInstance(machine, deployment.max_running_per_decode)
            for _ in range(deployment.decode_instances)
        ]
        self.broken: set[int] = set()
        self.outcome = Outcome()
        self._random = Random(deployment.seed)  # noqa: S311 - phases of a simulation, not a secret
        self._heap: list[tuple[float, int, str, Any]] = []
        self._order = 0

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Serve all requests to their end."""
        for number, request in enumerate(requests):
            keys = block_keys(request, number, self.machine.block_tokens)
            phase = self._random.random()
            job = Job(number, request, keys, request.prompt_tokens, request.arrival_s, credit=phase)
            self.outcome.jobs.append(job)
            self._at(request.arrival_s, "arrive", job)
        for at, instance in self.deployment.failures:
            self._at(at, "break", instance)
        handlers: dict[str, Callable[[float, Any], None]] = {
            "arrive": self._arrive,
            "prefilled": self._prefilled,
            "handed_over": self._handed_over,
            "decoded": self._decoded,
            "loaded": self._loaded,
            "break": self._break,
        }
        while self._heap:
            now, _, kind, what = heapq.heappop(self._heap)
            self.outcome.num_events += 1
            handlers[kind](now, what)
            self.outcome.now = max(self.outcome.now, now)
        self._close()
        return self.outcome

    def _at(self, when: float, kind: str, what: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (when, self._order, kind, what))

    def _arrive(self, now: float, job: Job) -> None:
        demand = Demand(
            model=MODEL,
            num_prompt_tokens=job.request.prompt_tokens,
            kv_bytes_per_token=self.machine.kv_bytes_per_token,
        )
        chosen = route(self._candidates(), demand)
        if chosen is None or chosen.prefill_worker is None:
            return  # nobody can prefill: the request is never completed and counts as failed
        job.prefill, job.decode = int(chosen.prefill_worker[1:]), int(chosen.decode_worker[1:])
        hits = self.pool.lookup(job.request.blocks)
        hit_tokens = min(hits * self.machine.block_tokens, job.request.prompt_tokens)
        self.outcome.hit_tokens += hit_tokens - job.hit_tokens
        job.hit_tokens = hit_tokens
        # The pool's last block may be a partly filled one; a step always computes at least one token.
        job.cached_tokens = (
            min(hits, (job.request.prompt_tokens - 1) // self.machine.block_tokens)
            * self.machine.block_tokens
        )
        self.outcome.loaded_bytes += job.cached_tokens * self.machine.kv_bytes_per_token
        self.prefill[job.prefill].scheduler.submit(job)
        self._admit(now, job.prefill)

    def _admit(self, now: float, number: int) -> None:
        instance = self.prefill[number]
        for job in instance.scheduler.admit():
            # Blocks still in this instance's HBM need not be fetched again.
            missing = max(0, job.cached_tokens - job.num_computed)
            self._at(now + self.machine.load_s(missing) if missing else now, "loaded", (job, job.attempt))

    def _loaded(self, now: float, what: tuple[Job, int]) -> None:
        job, attempt = what
        if attempt != job.attempt:
            return  # meanwhile its instance broke and it went elsewhere
        instance = self.prefill[job.prefill]
        if job.cached_tokens > job.num_computed:
            instance.scheduler.commit(job, job.cached_tokens - job.num_computed)
        job.cached_tokens = max(job.cached_tokens, job.num_computed)
        instance.scheduler.start(job)
        self._step(now, job.prefill)

    def _step(self, now: float, number: int) -> None:
        instance = self.prefill[number]
        if instance.busy or number in self.broken:
            return
        shares = self.machine.shares_cores
        step = instance.begin_step(shares and any(d.plan is not None for d in self.decode))
        if step is not None:
            seconds, plan = step
            instance.busy = True
            self._at(now + seconds, "prefilled", (number, plan))
            self._disturb(now)

    def _prefilled(self, now: float, what: tuple[int, Plan[Job]]) -> None:
        number, plan = what
        if number in self.broken:
            return
        instance = self.prefill[number]
        instance.busy = False
        for job in instance.end_step(plan):
            job.first_token_at = now
            self.pool.publish(job.request.blocks, now)
            if job.request.output_tokens == 1:
                job.finished_at = now
                continue
            num_bytes = job.request.prompt_tokens * self.machine.kv_bytes_per_token
            seconds = self.machine.handover_s(job.request.prompt_tokens, job.prefill, job.decode)
            self.outcome.handed_over_bytes += num_bytes
            self.outcome.handover_s += seconds
            pair = (job.prefill, job.decode)
            self.outcome.flows[pair] = self.outcome.flows.get(pair, 0) + num_bytes
            self._at(now + seconds, "handed_over", job)
        self._admit(now, number)
        self._step(now, number)
        if not instance.busy:
            self._disturb(now)

    def _handed_over(self, now: float, job: Job) -> None:
        instance = self.decode[job.decode]
        instance.join(job)
        if instance.plan is None:
            self._stretch(now, job.decode)
        else:
            self._interrupt(now, job.decode)

    def _interrupt(self, now: float, number: int) -> None:
        """A stretch under way ends with the step that is running: sequences join at step boundaries."""
        instance = self.decode[number]
        if instance.num_steps == 1:
            return
        steps = max(1, ceil((now - instance.stretch_at) / instance.step_s - 1e-9))
        if steps < instance.num_steps:
            instance.num_steps = steps
            instance.generation += 1
            ends_at = max(now, instance.stretch_at + steps * instance.step_s)
            self._at(ends_at, "decoded", (number, instance.generation))

    def _disturb(self, now: float) -> None:
        """Prefill began or ended: decode that shares its cores goes on at another pace."""
        if self.machine.shares_cores:
            for number, instance in enumerate(self.decode):
                if instance.plan is not None:
                    self._interrupt(now, number)

    def _stretch(self, now: float, number: int) -> None:
        instance = self.decode[number]
        shares = self.machine.shares_cores
        ends_at = instance.begin_stretch(now, shares and any(p.busy for p in self.prefill))
        if ends_at is not None:
            instance.generation += 1
            self._at(ends_at, "decoded", (number, instance.generation))

    def _decoded(self, now: float, what: tuple[int, int]) -> None:
        number, generation = what
        instance = self.decode[number]
        if generation != instance.generation:
            return
        for job in instance.end_stretch(now):
            job.finished_at = now
        self._stretch(now, number)

    def _break(self, now: float, number: int) -> None:
        """A prefill instance is lost; what it had goes elsewhere and starts again from what the pool holds."""
        self.broken.add(number)
        scheduler = self.prefill[number].scheduler
        for job in [*scheduler.running, *scheduler.loading, *scheduler.waiting]:
            scheduler.remove(job)
            job.num_computed = job.cached_tokens = job.counted_tokens = 0
            job.attempt += 1
            self._at(now, "arrive", job)

    def _candidates(self) -> list[Candidate]:
        spec = self.deployment
        found = []
        for number, prefill in enumerate(self.prefill):
            found.append(
                Candidate(
                    worker_id=f"p{number}",
                    role="prefill",
                    state="draining" if number in self.broken else "ready",
                    is_connected=True,
                    model=MODEL,
                    location=_location(number * spec.prefill_npus),
                    max_context_tokens=1 << 30,
                    num_sequences=len(prefill.scheduler.running) + len(prefill.scheduler.waiting),
                    num_queued_tokens=_queued_tokens(prefill),
                    kv_blocks_used=prefill.scheduler.blocks.num_used,
                    kv_blocks_total=prefill.scheduler.blocks.num_blocks,
                )
            )
        first = spec.prefill_instances * spec.prefill_npus
        for number, decode in enumerate(self.decode):
            found.append(
                Candidate(
                    worker_id=f"d{number}",
                    role="decode",
                    state="ready",
                    is_connected=True,
                    model=MODEL,
                    location=_location(first + number * spec.decode_npus),
                    max_context_tokens=1 << 30,
                    num_sequences=len(decode.scheduler.running) + len(decode.scheduler.waiting),
                    num_queued_tokens=0,
                    kv_blocks_used=decode.scheduler.blocks.num_used,
                    kv_blocks_total=decode.scheduler.blocks.num_blocks,
                )
            )
        return found

    def _close(self) -> None:
        outcome = self.outcome
        outcome.prompt_tokens = sum(job.request.prompt_tokens for job in outcome.jobs)
        outcome.pool_evictions = self.pool.num_evicted
        outcome.num_preempted = sum(d.num_preempted for d in self.decode)
        span_s = max(outcome.now, 1e-9)
        outcome.prefill_busy_share = [p.busy_s / span_s for p in self.prefill]
        outcome.decode_busy_share = [d.busy_s / span_s for d in self.decode]
        outcome.mean_decode_sequences = [
            d.weighted_sequences_s / d.busy_s if d.busy_s else 0.0 for d in self.decode
        ]


def _queued_tokens(instance: PrefillInstance) -> int:
    scheduler = instance.scheduler
    return sum(
        job.num_uncomputed
        for queue in (scheduler.waiting, scheduler.loading, scheduler.running)
        for job in queue
    )


def _location(npu: int) -> Location:
    return Location(node=npu // 8, npu=npu % 8, die=0)
