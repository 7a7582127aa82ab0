"""The instances of a simulated deployment: where they are, what they do now, and how router and autoscaler see them."""

from dataclasses import dataclass, field

from app.matrix.autoscaler import Side, WorkerLoad
from app.routing.scorers import Candidate
from app.twin.faults import Fault
from app.twin.instance import DecodeInstance, Job, PrefillInstance
from app.twin.machine import Machine
from engine.protocol import Location, WorkerState
from fabric.topology import NPUS_PER_NODE

MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Instances and their limits, and what breaks while they serve.

    With `autoscale`, instances change sides by the live autoscaler's decision; an instance that turns has to empty
    first and then takes `role_switch_s`. `slo_ttft_s` and `slo_tpot_s` are that decision's targets.
    """

    prefill_instances: int
    decode_instances: int
    max_running_per_decode: int
    prefill_npus: int
    decode_npus: int
    pool_bytes: float | None = None
    num_pool_servers: int = 1
    faults: tuple[Fault, ...] = ()
    autoscale: bool = False
    role_switch_s: float = 5.0
    slo_ttft_s: float = 5.0
    slo_tpot_s: float = 0.05
    seed: int = 0


@dataclass(slots=True, eq=False)
class Unit:
    """One instance: NPUs that prefill or decode. `turning_to`: the side that it changes to, once it is empty."""

    number: int
    npus: range
    role: Side
    state: WorkerState = "ready"
    is_lost: bool = False
    turning_to: Side | None = None
    num_incoming: int = 0
    """Sequences whose KV is on its way to it."""
    num_outgoing: int = 0
    """Handovers begun; they go round over the instance's NPUs."""
    role_since: float = 0.0
    role_s: dict[Side, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    busy_s: dict[Side, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    sequence_s: float = 0.0
    """Integral of the sequences that decoded together."""
    num_preempted: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0

    @property
    def name(self) -> str:
        """As a worker's id."""
        return f"w{self.number:03d}"

    @property
    def is_ready(self) -> bool:
        """Whether it takes new work."""
        return self.state == "ready" and not self.is_lost

    def touches(self, node: int) -> bool:
        """Whether some of its NPUs are in that node."""
        return self.npus[0] // NPUS_PER_NODE <= node <= self.npus[-1] // NPUS_PER_NODE

    def npu(self, number: int) -> int:
        """The NPU that has the sequence's KV: sequences go round."""
        return self.npus[number % len(self.npus)]


class Fleet:
    """All units, prefill first. `prefill` and `decode` hold what those with that role run, by unit number."""

    def __init__(self, machine: Machine, deployment: Deployment) -> None:
        self.machine = machine
        self.deployment = deployment
        self.units: list[Unit] = []
        self.prefill: dict[int, PrefillInstance] = {}
        self.decode: dict[int, DecodeInstance] = {}
        first = 0
        sides: tuple[tuple[Side, int, int], ...] = (
            ("prefill", deployment.prefill_instances, deployment.prefill_npus),
            ("decode", deployment.decode_instances, deployment.decode_npus),
        )
        for role, count, npus in sides:
            for _ in range(count):
                unit = Unit(len(self.units), range(first, first + npus), role)
                self.units.append(unit)
                self.open(unit, role, 0.0)
                first += npus

    def open(self, unit: Unit, role: Side, now: float) -> None:
        """The unit begins, empty, on that side."""
        unit.role, unit.state, unit.turning_to, unit.role_since = role, "ready", None, now
        if role == "prefill":
            self.prefill[unit.number] = PrefillInstance(self.machine)
        else:
            limit = self.deployment.max_running_per_decode
            self.decode[unit.number] = DecodeInstance(self.machine, limit)

    def close(self, unit: Unit, now: float) -> list[Job]:
        """The unit ends what it does; the jobs that were still there, taken out."""
        self._count_time(unit, now)
        engine = self.prefill.pop(unit.number, None) or self.decode.pop(unit.number, None)
        if engine is None:
            return []
        scheduler = engine.scheduler
        jobs = [*scheduler.running, *scheduler.loading, *scheduler.waiting]
        for job in jobs:
            scheduler.remove(job)
        return jobs

    def _count_time(self, unit: Unit, now: float) -> None:
        """Add to the unit's totals what its engine has counted since it began."""
        prefill, decode = self.prefill.get(unit.number), self.decode.get(unit.number)
        if prefill is not None:
            unit.busy_s["prefill"] += prefill.busy_s
        if decode is not None:
            unit.busy_s["decode"] += decode.busy_s
            unit.sequence_s += decode.weighted_sequences_s
            unit.num_preempted += decode.num_preempted
        if prefill is not None or decode is not None:
            unit.role_s[unit.role] += max(0.0, now - unit.role_since)

    def is_empty(self, unit: Unit) -> bool:
        """Whether nothing is there or on its way."""
        prefill, decode = self.prefill.get(unit.number), self.decode.get(unit.number)
        if prefill is not None and prefill.busy:
            return False
        engine = prefill or decode
        if engine is None:
            return True
        scheduler = engine.scheduler
        return not (unit.num_incoming or scheduler.running or scheduler.loading or scheduler.waiting)

    def candidates(self) -> list[Candidate]:
        """The instances as the live router sees workers."""
        found = []
        for unit in self.units:
            prefill, decode = self.prefill.get(unit.number), self.decode.get(unit.number)
            engine = prefill or decode
            if engine is None or unit.is_lost:
                continue
            scheduler = engine.scheduler
            found.append(
                Candidate(
                    worker_id=unit.name,
                    role=unit.role,
                    state=unit.state,
                    is_connected=True,
                    model=MODEL,
                    location=_location(unit.npus[0]),
                    max_context_tokens=1 << 30,
                    num_sequences=len(scheduler.running) + len(scheduler.waiting) + unit.num_incoming,
                    num_queued_tokens=prefill.num_queued_tokens if prefill is not None else 0,
                    kv_blocks_used=scheduler.blocks.num_used,
                    kv_blocks_total=scheduler.blocks.num_blocks,
                )
            )
        return found

    def loads(self) -> list[WorkerLoad]:
        """The instances as the live autoscaler sees workers."""
        found = []
        for unit in self.units:
            if unit.is_lost:
                continue
            prefill, decode = self.prefill.get(unit.number), self.decode.get(unit.number)
            engine = prefill or decode
            scheduler = engine.scheduler if engine is not None else None
            found.append(
                WorkerLoad(
                    worker_id=unit.name,
                    role=unit.role,
                    state=unit.state,
                    num_running=len(scheduler.running) if scheduler else 0,
                    num_waiting=len(scheduler.waiting) + len(scheduler.loading) if scheduler else 0,
                    num_queued_tokens=prefill.num_queued_tokens if prefill is not None else 0,
                    kv_share=scheduler.blocks.num_used / scheduler.blocks.num_blocks if scheduler else 0.0,
                )
            )
        return found


def unit_number(worker_id: str) -> int:
    """The unit of a worker's id."""
    return int(worker_id[1:])


def _location(npu: int) -> Location:
    return Location(node=npu // NPUS_PER_NODE, npu=npu % NPUS_PER_NODE, die=0)
