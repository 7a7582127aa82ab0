"""A prefill or decode instance in the simulation: the live scheduler over a virtual cache.

The scheduler is `engine.scheduler.Scheduler`, the one that workers run; blocks are the trace's 512-token
blocks. A decode instance that nothing disturbs repeats the same plan, so it asks for a new one only when a
sequence arrives, ends or needs another block, and lets the steps in between pass at once.
"""

from dataclasses import dataclass, field, replace
from math import ceil

from app.twin.machine import Machine
from app.twin.trace import Request
from engine.block_manager import BlockManager
from engine.scheduler import Limits, Plan, Scheduler

UNLIMITED = 1_000_000


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way: what the scheduler must know (`engine.scheduler.Work`), and its instants."""

    number: int
    request: Request
    keys: list[bytes]
    num_tokens: int
    """Known so far: the prompt, and what was generated before a fault or a preemption."""
    arrived_at: float
    prefill: int = 0
    decode: int = 0
    priority: int = 0
    expires_at: float | None = None
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    computes_all: bool = False
    attempt: int = 0
    hit_tokens: int = 0
    cached_tokens: int = 0
    counted_tokens: int = 0
    lost_tokens: int = 0
    """Tokens whose KV a fault took; those that the pool does not have are computed again."""
    credit: float = 0.0
    num_generated: int = 0
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def num_uncomputed(self) -> int:
        """Known tokens without KV."""
        return self.num_tokens - self.num_computed


def block_keys(
    request: Request, number: int, block_tokens: int, num_tokens: int | None = None
) -> list[bytes]:
    """Names of the full blocks of a prompt, or of so many tokens of prompt and answer.

    Blocks that the trace does not name are the request's own.
    """
    full = request.prompt_tokens // block_tokens
    named = [block.to_bytes(8, "little", signed=True) for block in request.blocks[:full]]
    full = full if num_tokens is None else num_tokens // block_tokens
    return named + [b"%d/%d" % (number, i) for i in range(len(named), full)]


class PrefillInstance:
    """Computes prompts in steps of at most `machine.max_step_tokens` tokens."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        blocks = BlockManager(max(1, machine.prefill_kv_tokens // machine.block_tokens), machine.block_tokens)
        limits = Limits(
            max_running=UNLIMITED,
            max_waiting=UNLIMITED,
            max_step_tokens=machine.max_step_tokens,
            fills_steps=machine.fills_steps,
        )
        self.scheduler: Scheduler[Job] = Scheduler(blocks, limits)
        self.busy = False
        self.busy_s = 0.0

    @property
    def num_queued_tokens(self) -> int:
        """Known tokens that are still to be computed here."""
        scheduler = self.scheduler
        return sum(
            job.num_uncomputed
            for queue in (scheduler.waiting, scheduler.loading, scheduler.running)
            for job in queue
        )

    def begin_step(self, decode_busy: bool = False) -> tuple[float, Plan[Job]] | None:
        """The next step and its seconds, or None when there is nothing to compute."""
        plan = self.scheduler.plan()
        if not plan.slots:
            return None
        cached = 0
        for slot in plan.slots:
            cached += slot.work.cached_tokens - slot.work.counted_tokens
            slot.work.counted_tokens = slot.work.cached_tokens
        rows = plan.num_prefill + plan.num_decode
        seconds = self.machine.prefill_s(rows, cached, plan.num_attended / rows, decode_busy)
        self.busy_s += seconds
        return seconds, plan

    def end_step(self, plan: Plan[Job]) -> list[Job]:
        """Commit a step; the prompts that are complete have left the instance."""
        done = []
        for slot in plan.slots:
            self.scheduler.commit(slot.work, slot.num_rows)
            if slot.work.num_uncomputed == 0:
                done.append(slot.work)
        for job in done:
            self.scheduler.remove(job)
        return done


class DecodeInstance:
    """Lets its sequences grow by `machine.tokens_per_decode_step` tokens a step until each is done."""

    def __init__(self, machine: Machine, max_running: int) -> None:
        self.machine = machine
        blocks = BlockManager(max(1, machine.decode_kv_tokens // machine.block_tokens), machine.block_tokens)
        limits = Limits(max_running=max_running, max_waiting=UNLIMITED)
        if not machine.joins_gradually:
            limits = replace(limits, joining_share=None)
        self.scheduler: Scheduler[Job] = Scheduler(blocks, limits)
        self.generation = 0
        self.stretch_at = 0.0
        self.step_s = 0.0
        self.num_steps = 0
        self.plan: Plan[Job] | None = None
        self.busy_s = 0.0
        self.weighted_sequences_s = 0.0
        self.num_preempted = 0

    def join(self, job: Job) -> None:
        """A prompt's KV has arrived: the first token is known, the next ones are to be decoded."""
        job.keys = []
        job.num_computed = 0
        job.num_tokens = job.request.prompt_tokens + job.num_generated
        self.scheduler.submit(job)

    def admit(self) -> None:
        """Take in whoever has room."""
        for job in self.scheduler.admit():
            # KV comes with the handover, also of a sequence that gave way before.
            job.num_computed = job.num_tokens - 1
            self.scheduler.start(job)

    def begin_stretch(self, now: float, prefill_busy: bool = False) -> float | None:
        """Plan and let the same step repeat; when the stretch ends, or None when there is nothing to do."""
        self.admit()
        for job in self.scheduler.running:
            job.draft = [0]
        plan = self.scheduler.plan()
        self.num_preempted += len(plan.preempted)
        self.plan = None
        if not plan.slots:
            return None
        jobs = [slot.work for slot in plan.slots]
        rate = self.machine.tokens_per_decode_step
        self.num_steps = max(1, min(self._steps_left(job, rate) for job in jobs))
        if self.scheduler.has_joining:
            self.num_steps = 1
        mean_context = sum(job.num_tokens for job in jobs) / len(jobs) + rate * self.num_steps / 2
        self.step_s = self.machine.decode_s(len(jobs), mean_context, prefill_busy)
        self.plan, self.stretch_at = plan, now
        return now + self.num_steps * self.step_s

    def paces(self, now: float, min_tokens: int) -> list[float]:
        """Seconds per token after the first, so far, of the answers under way that have so many tokens."""
        steps = int((now - self.stretch_at) / self.step_s) if self.plan is not None else 0
        decoding = {id(slot.work) for slot in self.plan.slots} if self.plan is not None else set()
        found = []
        for job in self.scheduler.running:
            tokens = job.num_generated
            if id(job) in decoding:
                tokens += int(job.credit + steps * self.machine.tokens_per_decode_step)
            if job.first_token_at is not None and tokens >= min_tokens:
                found.append((now - job.first_token_at) / (tokens - 1))
        return found

    def end_stretch(self, now: float) -> list[Job]:
        """Credit the steps that have begun since the stretch did; the sequences that are complete have left."""
        if self.plan is None:
            return []
        done = self._credit(min(self.num_steps, max(1, ceil((now - self.stretch_at) / self.step_s - 1e-9))))
        for job in done:
            self.scheduler.remove(job)
        return done

    def abandon_stretch(self, now: float) -> None:
        """The instance breaks: only steps that had ended count."""
        if self.plan is not None:
            self._credit(min(self.num_steps, int((now - self.stretch_at) / self.step_s)))

    def _credit(self, steps: int) -> list[Job]:
        """Let every sequence of the plan have made so many steps; those that are complete."""
        assert self.plan is not None
        elapsed_s = steps * self.step_s
        self.busy_s += elapsed_s
        self.weighted_sequences_s += elapsed_s * len(self.plan.slots)
        rate = self.machine.tokens_per_decode_step
        done = []
        for slot in self.plan.slots:
            job = slot.work
            job.credit += steps * rate
            tokens = min(int(job.credit), job.request.output_tokens - job.num_generated)
            job.credit -= int(job.credit)
            job.num_generated += tokens
            job.num_tokens += tokens
            job.num_computed = job.num_tokens - 1
            if job.num_generated >= job.request.output_tokens:
                done.append(job)
        self.plan = None
        return done

    def _steps_left(self, job: Job, rate: float) -> int:
        """Steps until this sequence is complete or might need a block that it does not have."""
        to_end = ceil((job.request.output_tokens - job.num_generated - job.credit) / rate - 1e-9)
        room = len(job.blocks) * self.machine.block_tokens - job.num_tokens
        return min(to_end, int(room / rate))
