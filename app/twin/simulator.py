"""A supernode serving a trace, event by event on virtual time, decided by the live code.

    arrival -> route -> (pool) -> prefill steps -> handover -> decode stretches -> done
       ^______________________________________________|  a fault: from the pool, or recomputed

`app.routing.router.route` chooses the workers, `engine.scheduler.Scheduler` plans every step,
`memory_pool.eviction.LruIndex` decides what the pool keeps, `app.matrix.autoscaler.decide` turns instances, and
`fabric.sharing` gives transfers that overlap their rates. The clock belongs to the heap: nothing here reads another.
With the same requests, machine and seed the result is the same to the last digit.
"""

import heapq
from collections.abc import Callable, Sequence
from math import ceil
from random import Random
from typing import Any

from app.matrix.autoscaler import EVERY_S, Memory, Policy, decide
from app.routing.router import Demand, Route, route
from app.twin.faults import Fault
from app.twin.fleet import MODEL, Deployment, Fleet, Unit, unit_number
from app.twin.instance import DecodeInstance, Job, PrefillInstance, block_keys
from app.twin.machine import Machine
from app.twin.outcome import Outcome
from app.twin.pool import TwinPool
from app.twin.trace import Request
from app.twin.transfers import Cargo, Shipment, Transfers
from app.twin.watch import Watch
from engine.scheduler import Plan
from fabric.topology import FabricError

PATIENCE_S = 600.0
"""How long the autoscaler goes on looking when nothing else happens."""


class Simulator:
    """One run. `run()` may be called once."""

    def __init__(self, machine: Machine, deployment: Deployment) -> None:
        self.machine = machine
        self.deployment = deployment
        self.fleet = Fleet(machine, deployment)
        block_bytes = machine.kv_bytes_per_token * machine.block_tokens
        self.pool = TwinPool(block_bytes, deployment.pool_bytes, deployment.num_pool_servers)
        self.transfers = Transfers(machine.capacity())
        self.outcome = Outcome(units=self.fleet.units)
        self.policy = Policy(ttft_target_s=deployment.slo_ttft_s, tpot_target_s=deployment.slo_tpot_s)
        self._memory = Memory()
        self._watch = Watch()
        self._parked: list[Job] = []
        self._faults: list[Fault] = []
        self._handovers: dict[int, Job] = {}
        self._wires_generation = 0
        self._last_progress_at = 0.0
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
        for fault in self.deployment.faults:
            self._at(fault.at_s, "break", fault)
        if self.deployment.autoscale:
            self._at(EVERY_S, "look", None)
        handlers: dict[str, Callable[[float, Any], None]] = {
            "arrive": self._arrive,
            "loaded": self._loaded,
            "prefilled": self._prefilled,
            "handed_over": self._handed_over,
            "decoded": self._decoded,
            "wires": self._wires,
            "break": self._break,
            "repair": self._repair,
            "look": self._look,
            "turned": self._turned,
        }
        while self._heap:
            now, _, kind, what = heapq.heappop(self._heap)
            self.outcome.num_events += 1
            handlers[kind](now, what)
        self._close()
        return self.outcome

    def _at(self, when: float, kind: str, what: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (when, self._order, kind, what))

    # The way of a request.

    def _arrive(self, now: float, job: Job) -> None:
        if not job.attempt:
            self._watch.arrived(job)
        chosen = self._route(job)
        if chosen is None:
            self._parked.append(job)
            return
        job.prefill, job.decode = unit_number(chosen.prefill_worker or ""), unit_number(chosen.decode_worker)
        hits = self.pool.lookup(job.request.blocks)
        block_tokens = self.machine.block_tokens
        if not job.attempt:
            job.hit_tokens = min(hits * block_tokens, job.request.prompt_tokens)
            self.outcome.hit_tokens += job.hit_tokens
        # The pool's last block may be a partly filled one; a step always computes at least one token.
        full = min(job.request.prompt_tokens // block_tokens, (job.num_tokens - 1) // block_tokens)
        job.cached_tokens = min(hits, full) * block_tokens
        self.outcome.recomputed_tokens += max(0, job.lost_tokens - job.cached_tokens)
        job.lost_tokens = 0
        self.fleet.prefill[job.prefill].scheduler.submit(job)
        self._admit(now, job.prefill)

    def _route(self, job: Job) -> Route | None:
        """Two instances of the job's own, or None: nobody can prefill, or nobody can decode."""
        demand = Demand(
            model=MODEL,
            num_prompt_tokens=job.num_tokens,
            kv_bytes_per_token=self.machine.kv_bytes_per_token,
        )
        chosen = route(self.fleet.candidates(), demand)
        return chosen if chosen is not None and chosen.reason.mode == "disaggregated" else None

    def _admit(self, now: float, number: int) -> None:
        for job in self.fleet.prefill[number].scheduler.admit():
            # Blocks still in this instance's HBM need not be fetched again.
            missing = max(0, job.cached_tokens - job.num_computed)
            if missing:
                self.outcome.loaded_bytes += missing * self.machine.kv_bytes_per_token
                self._send(now, "loaded", job, self.machine.load(missing, number))
            else:
                self._at(now, "loaded", (job, job.attempt))

    def _loaded(self, now: float, what: tuple[Job, int]) -> None:
        job, attempt = what
        if attempt != job.attempt:
            return  # meanwhile its instance broke and it went elsewhere
        instance = self.fleet.prefill[job.prefill]
        if job.cached_tokens > job.num_computed:
            instance.scheduler.commit(job, job.cached_tokens - job.num_computed)
        job.cached_tokens = max(job.cached_tokens, job.num_computed)
        instance.scheduler.start(job)
        self._step(now, job.prefill)

    def _step(self, now: float, number: int) -> None:
        instance = self.fleet.prefill[number]
        if instance.busy:
            return
        shares = self.machine.shares_cores
        step = instance.begin_step(shares and any(d.plan is not None for d in self.fleet.decode.values()))
        if step is not None:
            seconds, plan = step
            instance.busy = True
            self._watch.prefilled(plan.num_prefill + plan.num_decode, seconds)
            self._at(now + seconds, "prefilled", (number, instance, plan))
            self._disturb(now)

    def _prefilled(self, now: float, what: tuple[int, PrefillInstance, Plan[Job]]) -> None:
        number, instance, plan = what
        if number not in self.fleet.prefill or self.fleet.prefill[number] is not instance:
            return  # it broke
        unit = self.fleet.units[number]
        instance.busy = False
        unit.prefilled_tokens += plan.num_prefill + plan.num_decode
        for job in instance.end_step(plan):
            job.num_generated += 1
            if job.first_token_at is None:
                job.first_token_at = now
                self._watch.first_token(job, now)
            self.pool.publish(job.request.blocks, now)
            if job.num_generated >= job.request.output_tokens:
                self._finish(now, job)
            else:
                self._hand_over(now, job)
        self._admit(now, number)
        self._step(now, number)
        if not instance.busy:
            self._disturb(now)
        self._settle(now, unit)

    def _hand_over(self, now: float, job: Job) -> None:
        target = self.fleet.units[job.decode]
        if not (target.is_ready and target.role == "decode"):
            chosen = self._route(job)
            if chosen is None:
                self._restart(now, job)
                return
            target = self.fleet.units[unit_number(chosen.decode_worker)]
            job.decode = target.number
        source = self.fleet.units[job.prefill]
        num_tokens = job.request.prompt_tokens + job.num_generated - 1
        for attempt in range(len(source.npus)):
            ends = source.npu(source.num_outgoing + attempt), target.npu(job.number + attempt)
            try:
                shipment = self.machine.handover(num_tokens, *ends)
            except FabricError:
                continue  # an NPU of these two is cut off; others of the instances are not
            source.num_outgoing += 1
            target.num_incoming += 1
            self._handovers[job.number] = job
            self.outcome.handed_over_bytes += num_tokens * self.machine.kv_bytes_per_token
            self._send(now, "handed_over", job, shipment)
            return

    def _handed_over(self, now: float, what: tuple[Job, int]) -> None:
        job, attempt = what
        if attempt != job.attempt:
            return
        del self._handovers[job.number]
        self.fleet.units[job.decode].num_incoming -= 1
        instance = self.fleet.decode[job.decode]
        instance.join(job)
        if instance.plan is None:
            self._stretch(now, job.decode)
        else:
            self._interrupt(now, job.decode)

    def _interrupt(self, now: float, number: int) -> None:
        """A stretch under way ends with the step that is running: sequences join at step boundaries."""
        instance = self.fleet.decode[number]
        if instance.num_steps == 1:
            return
        steps = max(1, ceil((now - instance.stretch_at) / instance.step_s - 1e-9))
        if steps < instance.num_steps:
            instance.num_steps = steps
            instance.generation += 1
            ends_at = max(now, instance.stretch_at + steps * instance.step_s)
            self._at(ends_at, "decoded", (number, instance, instance.generation))

    def _disturb(self, now: float) -> None:
        """Prefill began or ended: decode that shares its cores goes on at another pace."""
        if self.machine.shares_cores:
            for number, instance in self.fleet.decode.items():
                if instance.plan is not None:
                    self._interrupt(now, number)

    def _stretch(self, now: float, number: int) -> None:
        instance = self.fleet.decode[number]
        shares = self.machine.shares_cores
        ends_at = instance.begin_stretch(now, shares and any(p.busy for p in self.fleet.prefill.values()))
        if ends_at is not None:
            instance.generation += 1
            self._at(ends_at, "decoded", (number, instance, instance.generation))

    def _decoded(self, now: float, what: tuple[int, DecodeInstance, int]) -> None:
        number, instance, generation = what
        if number not in self.fleet.decode or self.fleet.decode[number] is not instance:
            return  # it broke
        if generation != instance.generation:
            return  # the stretch ended earlier
        unit = self.fleet.units[number]
        for job in instance.end_stretch(now):
            self._finish(now, job)
        self._stretch(now, number)
        self._settle(now, unit)

    def _finish(self, now: float, job: Job) -> None:
        job.finished_at = now
        self.fleet.units[job.decode].decoded_tokens += job.num_generated - 1
        self._watch.finished(job, now)
        self.outcome.now = self._last_progress_at = now

    # Transfers.

    def _send(self, now: float, kind: str, job: Job, shipment: Shipment) -> None:
        if shipment.flow is None:
            self._count(kind, shipment.startup_s, shipment.startup_s)
            self._at(now + shipment.startup_s, kind, (job, job.attempt))
            return
        cargo = Cargo(kind, job.attempt, now, shipment)
        self.transfers.start(job.number, cargo, now)
        self._await_wires()

    def _await_wires(self) -> None:
        self._wires_generation += 1
        at = self.transfers.next_at()
        if at is not None:
            self._at(at, "wires", self._wires_generation)

    def _wires(self, now: float, generation: int) -> None:
        if generation != self._wires_generation:
            return
        for at, number, cargo in self.transfers.arrived(now):
            self._count(cargo.kind, at - cargo.sent_at, cargo.shipment.idle_s)
            self._at(max(at, now), cargo.kind, (self.outcome.jobs[number], cargo.attempt))
        self._await_wires()

    def _count(self, kind: str, seconds: float, idle_s: float) -> None:
        if kind == "loaded":
            self.outcome.load_s += seconds
            self.outcome.load_idle_s += idle_s
        else:
            self.outcome.handover_s += seconds
            self.outcome.handover_idle_s += idle_s

    # Faults.

    def _break(self, now: float, fault: Fault) -> None:
        self._faults.append(fault)
        if fault.until_s is not None:
            self._at(fault.until_s, "repair", fault)
        if fault.kind in ("node", "pool"):
            self.outcome.pool_blocks_lost += self.pool.lose_server(fault.index, now)
        for unit in self.fleet.units:
            if not unit.is_lost and self._hits(fault, unit):
                self._lose(now, unit)
        self._rewire(now)

    def _repair(self, now: float, fault: Fault) -> None:
        self._faults.remove(fault)
        if fault.kind in ("node", "pool") and fault.index not in self._lost_servers():
            self.pool.restore_server(fault.index)
        for unit in self.fleet.units:
            if unit.is_lost and not any(self._hits(other, unit) for other in self._faults):
                unit.is_lost = False
                self.fleet.open(unit, unit.role, now)
        self._rewire(now)
        self._unpark(now)

    def _hits(self, fault: Fault, unit: Unit) -> bool:
        if fault.kind == "node":
            return unit.touches(fault.index)
        first = {"prefill": 0, "decode": self.deployment.prefill_instances}
        return fault.kind in first and unit.number == first[fault.kind] + fault.index

    def _lose(self, now: float, unit: Unit) -> None:
        """The instance is gone with all KV in it; its jobs start again from what the pool holds."""
        decode = self.fleet.decode.get(unit.number)
        if decode is not None:
            decode.abandon_stretch(now)
        jobs = self.fleet.close(unit, now)
        ends = (job for job in self._handovers.values() if unit.number in (job.prefill, job.decode))
        unit.is_lost, unit.state, unit.turning_to = True, "ready", None
        for job in [*jobs, *ends]:
            if job.num_generated >= job.request.output_tokens:
                self._finish(now, job)
            else:
                self._restart(now, job)

    def _lost_servers(self) -> set[int]:
        return {fault.index for fault in self._faults if fault.kind in ("node", "pool")}

    def _rewire(self, now: float) -> None:
        failed = {fault.component for fault in self._faults if fault.kind == "fabric"}
        self.machine.rewire(failed, len(self._lost_servers()))
        for number in self.transfers.rewire(self.machine.capacity(), now):
            self._restart(now, self.outcome.jobs[number])
        self._await_wires()
        for number, instance in self.fleet.decode.items():
            if instance.plan is not None:
                self._interrupt(now, number)

    def _restart(self, now: float, job: Job) -> None:
        """Begin again, with the tokens that were generated: what the pool holds of the KV is not computed again."""
        job.attempt += 1
        self.outcome.num_restarted += 1
        job.lost_tokens = job.num_computed
        if self._handovers.pop(job.number, None) is not None:
            self.fleet.units[job.decode].num_incoming -= 1
            self._settle(now, self.fleet.units[job.decode])
        if job.number in self.transfers:
            self.transfers.cancel(job.number, now)
            self._await_wires()
        if job.prefill in self.fleet.prefill:
            self.fleet.prefill[job.prefill].scheduler.remove(job)
            self._settle(now, self.fleet.units[job.prefill])
        job.num_computed = job.cached_tokens = job.counted_tokens = 0
        job.draft = []
        job.num_tokens = job.request.prompt_tokens + job.num_generated
        job.keys = block_keys(job.request, job.number, self.machine.block_tokens, job.num_tokens)
        self._at(now, "arrive", job)

    # Roles.

    def _look(self, now: float, _: None) -> None:
        decision = decide(self.policy, self._memory, self._watch.observe(now, self.fleet))
        self._memory = decision.memory
        if decision.change is not None:
            self._last_progress_at = now
            self.outcome.role_changes.append((now, decision.change))
            unit = self.fleet.units[unit_number(decision.change.worker_id)]
            unit.state, unit.turning_to = "draining", decision.change.role
            self._settle(now, unit)
        if self._heap or (self._parked and now - self._last_progress_at < PATIENCE_S):
            self._at(now + EVERY_S, "look", None)

    def _settle(self, now: float, unit: Unit) -> None:
        """A draining instance that is empty begins to turn."""
        if unit.state == "draining" and self.fleet.is_empty(unit):
            self.fleet.close(unit, now)
            unit.state = "starting"
            self._at(now + self.deployment.role_switch_s, "turned", unit)

    def _turned(self, now: float, unit: Unit) -> None:
        if unit.state == "starting" and unit.turning_to is not None:
            self.fleet.open(unit, unit.turning_to, now)
            self._unpark(now)

    def _unpark(self, now: float) -> None:
        """Somebody may be able to serve those that nobody could."""
        parked, self._parked = self._parked, []
        for job in parked:
            self._at(now, "arrive", job)

    def _close(self) -> None:
        outcome = self.outcome
        outcome.prompt_tokens = sum(job.request.prompt_tokens for job in outcome.jobs)
        outcome.pool_evictions = self.pool.num_evicted
        for unit in self.fleet.units:
            self.fleet.close(unit, outcome.now)
            outcome.num_preempted += unit.num_preempted
