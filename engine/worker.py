"""The engine loop of a worker: takes in requests, runs steps, hands out events. One thread, one loop.

    Submit ──> queued ──> loading ──────────> running ──────────> closing ──> Prefilled / Finished
                 │          KV from the pool    │ step by step      waits for published blocks
                 │                              ├──> Tokens, BlocksPublished on the way
                 │ <── preempted ───────────────┘
                 ├──> Failed(overloaded | draining | too_long | expired)
    Cancel ──> from any state: blocks given back, Finished(abort)

Other threads only put messages into the inbox: the server (requests, cancels, closed links) and the IO threads of the
handoff (KV that has moved). Events leave once a step, for all sequences together, through `deliver`.
"""

import contextlib
import logging
import math
import queue
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from engine import protocol
from engine.block_manager import BlockManager
from engine.handoff import Handoff, Identity, Job, Pool
from engine.metrics import WorkerMetrics
from engine.protocol import BlocksPublished, Failed, Finished, FromWorker, Prefetch, Prefilled, Tokens
from engine.sampler import Sampled
from engine.scheduler import Limits, Plan, Scheduler
from engine.sequence import Sequence, Status
from engine.speculation import Drafter
from engine.step import Forward, Outcome, run_step

log = logging.getLogger(__name__)

CLOSING_S = 1.0
"""How long a finished request's report waits for its last published blocks."""
ATTENDED_ROWS = 8
"""Steps of fewer rows are over before handing them to another thread would pay."""
_TICK_S = 0.05
"""How often an idle loop looks at the clock while something can time out."""

FailureCode = Literal["overloaded", "draining", "expired", "too_long", "internal"]
Deliver = Callable[[dict[str, list[FromWorker]]], None]
"""Takes the events of a step, by link. Called in the engine thread."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    identity: Identity


@dataclass(frozen=True, slots=True)
class _Prefetch:
    identity: Identity
    message: Prefetch


@dataclass(frozen=True, slots=True)
class _LinkClosed:
    link: str


class _StepDone:
    pass


class _Stop:
    pass


_Message = Sequence | _Cancel | _Prefetch | _LinkClosed | Job | _StepDone | _Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a worker is."""

    running: int
    waiting: int
    queued_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int


class Worker:
    """One engine: a model's `forward`, the blocks it computes in, and the requests it serves.

    `memory(block)` is the memory of a local KV block. `max_context_tokens` bounds prompt and output together and must
    fit into `num_blocks` blocks. Without a `drafter` each step gives one token. All instants are of `clock`.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        place: str,
        forward: Forward,
        memory: Callable[[int], memoryview],
        num_blocks: int,
        block_tokens: int,
        max_context_tokens: int,
        pool: Pool,
        limits: Limits,
        metrics: WorkerMetrics,
        deliver: Deliver,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.worker_id = worker_id
        self.max_context_tokens = min(max_context_tokens, num_blocks * block_tokens)
        self.metrics = metrics
        self.is_draining = False
        self._forward = forward
        self._deliver = deliver
        self._drafter = drafter
        self._clock = clock
        self._blocks = BlockManager(num_blocks, block_tokens)
        self._scheduler: Scheduler[Sequence] = Scheduler(self._blocks, limits)
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._handoff = Handoff(pool, self._blocks, memory, place=place, done=self._inbox.put, clock=clock)
        self._sequences: dict[Identity, Sequence] = {}
        self._closing: dict[Sequence, float] = {}
        self._outbox: defaultdict[str, list[FromWorker]] = defaultdict(list)
        self._is_stopped = False
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._in_step: set[Sequence] = set()
        self._late: list[Sequence] = []
        metrics.watch(
            running=lambda: self.load().running,
            waiting=lambda: self.load().waiting,
            usage=lambda: self._blocks.num_used / num_blocks,
            idle_blocks=lambda: self._blocks.num_idle,
        )

    # For other threads.

    def submit(self, sequence: Sequence) -> None:
        """Serve a request."""
        self._inbox.put(sequence)

    def cancel(self, link: str, request_id: str) -> None:
        """Forget a request; an unknown one is ignored."""
        self._inbox.put(_Cancel((link, request_id)))

    def prefetch(self, link: str, message: Prefetch) -> None:
        """Fetch blocks that a coming request will want."""
        self._inbox.put(_Prefetch((link, message.request_id), message))

    def close_link(self, link: str) -> None:
        """Cancel everything that came over a link."""
        self._inbox.put(_LinkClosed(link))

    def stop(self) -> None:
        """End the loop after its present step; what is unfinished is lost."""
        self._inbox.put(_Stop())

    def load(self) -> Load:
        """How busy the worker is now."""
        scheduler = self._scheduler
        return Load(
            running=len(scheduler.running) + len(scheduler.loading),
            waiting=len(scheduler.waiting),
            queued_tokens=scheduler.queued_tokens,
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_total=self._blocks.num_blocks,
        )

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do for anyone."""
        return not self._sequences and not self._handoff.num_jobs and self._inbox.empty()

    # The loop.

    def run(self) -> None:
        """Serve until stopped."""
        while not self._is_stopped:
            if not self.turn():
                self._wait()
        self.close()

    def close(self) -> None:
        """End the threads that work for the loop."""
        self._handoff.close()
        self._computing.shutdown()

    def turn(self) -> bool:
        """One round of the loop; whether there was anything to do."""
        busy = self._receive()
        busy |= self._expire()
        busy |= self._admit()
        busy |= self._step(self._plan())
        self._send()
        return busy

    def _wait(self) -> None:
        can_time_out = self._closing or any(w.expires_at is not None for w in self._scheduler.waiting)
        with contextlib.suppress(queue.Empty):
            self._take(self._inbox.get(timeout=_TICK_S if can_time_out else None))

    def _receive(self) -> bool:
        received = False
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._inbox.get_nowait())
                received = True
        return received

    def _expire(self) -> bool:
        now = self._clock()
        expired = self._scheduler.expire(now)
        for sequence in expired:
            self._fail(sequence, "expired", "the request waited longer than its deadline allows")
        late = [sequence for sequence, deadline in self._closing.items() if deadline <= now]
        for sequence in late:
            self._end(sequence)
        return bool(expired or late)

    def _admit(self) -> bool:
        admitted = self._scheduler.admit(self._handoff.arriving)
        for sequence in admitted:
            self._load(sequence)
        return bool(admitted)

    def _plan(self) -> Plan[Sequence]:
        running = self._scheduler.running
        for sequence in running:
            sequence.draft = []
        # Drafts are for steps that only decode: beside a prompt, rows are better spent on the prompt.
        if self._drafter is not None and all(sequence.num_uncomputed == 1 for sequence in running):
            self._drafter.propose(running)
        return self._scheduler.plan()

    def _step(self, plan: Plan[Sequence]) -> bool:
        started_at = self._clock()
        for sequence in plan.preempted:
            sequence.status = Status.QUEUED
            sequence.timeline.enter("queue", started_at)
            self.metrics.num_preemptions.inc()
        if not plan.slots:
            return bool(plan.preempted)
        try:
            outcomes = self._compute(plan)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(plan.slots))
            for slot in plan.slots:
                self._fail(slot.work, "internal", f"the engine failed: {error}")
            self._late.clear()
            return True
        now = self._clock()
        self._scheduler.step_time.observe(
            plan.num_decode, plan.num_prefill, plan.num_attended, now - started_at
        )
        if self._drafter is not None and not plan.num_prefill:
            self._drafter.costs.observe(plan.num_decode, now - started_at)
        self.metrics.stepped(plan.num_decode + plan.num_prefill, now - started_at)
        for outcome in outcomes:
            self._take_in(outcome, now)
        self._abort_late()
        return True

    def _compute(self, plan: Plan[Sequence]) -> list[Outcome]:
        """Run a step. While a long one is computed messages are attended to, so that KV moves and handoffs leave."""
        if plan.num_decode + plan.num_prefill < ATTENDED_ROWS:
            return run_step(self._forward, plan)
        computing = self._computing.submit(run_step, self._forward, plan)
        computing.add_done_callback(lambda _: self._inbox.put(_StepDone()))
        self._in_step = {slot.work for slot in plan.slots}
        while not computing.done():
            self._take(self._inbox.get())
            self._admit()
            self._send()
        self._in_step = set()
        return computing.result()

    def _abort_late(self) -> None:
        """Cancel what was to be cancelled while a step computed it."""
        late, self._late = self._late, []
        for sequence in late:
            if sequence.status is not Status.OVER:
                self._abort(sequence)

    def _send(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, defaultdict(list)
            self._deliver(outbox)

    # Messages.

    def _take(self, message: _Message) -> None:
        match message:
            case Sequence():
                self._accept(message)
            case Job():
                self._moved(message)
            case _Prefetch(identity, wanted):
                if not self.is_draining:
                    self._handoff.prefetch(identity, wanted.namespace, wanted.block_keys, wanted.tokens)
            case _Cancel():
                self._handoff.take_prefetched(message.identity)
                if sequence := self._sequences.get(message.identity):
                    self._abort(sequence)
            case _LinkClosed():
                self._handoff.forget_link(message.link)
                for sequence in [s for s in self._sequences.values() if s.link == message.link]:
                    self._abort(sequence)
            case _StepDone():
                pass  # it has done its work by waking the loop
            case _Stop():
                self._is_stopped = True

    def _accept(self, sequence: Sequence) -> None:
        if sequence.identity in self._sequences:
            return self._refuse(sequence, "internal", "a request of this id is being served already")
        if self.is_draining:
            return self._refuse(sequence, "draining", "the worker finishes what it has and takes nothing new")
        room = self.max_context_tokens - 1
        if not 0 < sequence.num_tokens <= room:
            return self._refuse(
                sequence,
                "too_long",
                f"{sequence.num_tokens} tokens; this worker holds 1 to {room} and an answer",
            )
        if self._scheduler.is_full:
            return self._refuse(
                sequence, "overloaded", f"{len(self._scheduler.waiting)} requests wait already"
            )
        sequence.transfers += self._handoff.take_prefetched(sequence.identity)
        self._sequences[sequence.identity] = sequence
        self._scheduler.submit(sequence)
        return None

    # The life of a sequence.

    def _load(self, sequence: Sequence) -> None:
        """Admitted: fetch what is known of its KV, and let it run as soon as that is here."""
        now = self._clock()
        sequence.status = Status.LOADING
        self.metrics.queue_seconds.observe(now - sequence.arrived_at)
        self.metrics.prompt_tokens.inc(sequence.num_prompt)
        self.metrics.prefix_cache_queries.inc(sequence.num_tokens)
        self.metrics.prefix_cache_hits.inc(sequence.num_computed)
        sequence.local_tokens = sequence.num_computed
        if sequence.phase == "prefill":
            # The pool may have lost what is still here; the decode worker will look for it there.
            self._publish_progress(sequence)
        sequence.timeline.enter("fetch" if sequence.handoff else "lookup", now)
        if not self._handoff.load(sequence):
            self._run(sequence, None)

    def _run(self, sequence: Sequence, job: Job | None) -> None:
        before = sequence.num_computed
        self._scheduler.start(sequence)
        sequence.status = Status.RUNNING
        if job is not None:
            self._take_tail(sequence, job)
            self.metrics.external_queries.inc(sequence.num_tokens - before)
            self.metrics.external_hits.inc(sequence.num_computed - before)
            sequence.num_published = max(
                sequence.num_published, sequence.num_computed // self._blocks.block_tokens
            )
        sequence.fetched_tokens = sequence.num_computed - before
        sequence.num_accounted = sequence.num_computed
        decodes = sequence.num_uncomputed == 1 and sequence.num_generated
        sequence.timeline.enter("decode" if decodes else "prefill", self._clock())

    def _take_tail(self, sequence: Sequence, job: Job) -> None:
        if sequence.handoff is None or job.tail is None or job.tail not in job.moved:
            return
        if sequence.num_computed == job.tail.index * self._blocks.block_tokens:
            sequence.num_computed = min(sequence.handoff.num_tokens, sequence.num_tokens - 1)

    def _take_in(self, outcome: Outcome, now: float) -> None:
        """A step's result: newly filled blocks, new tokens, perhaps the end."""
        slot, sequence = outcome.slot, outcome.slot.work
        first = sequence.num_computed
        # The newest generated token is run to decode, not to make up for KV that was missing.
        num_given = sequence.num_tokens - (1 if sequence.num_generated else 0)
        taken: list[Sampled] = []
        for sampled in outcome.sampled:
            taken.append(sampled)
            if sequence.append(sampled.token_id, max_context_tokens=self.max_context_tokens):
                break
        num_rows = slot.num_rows - slot.num_draft + max(0, len(taken) - 1)
        filled = self._scheduler.commit(sequence, num_rows)
        if self._drafter is not None and slot.num_draft:
            self._drafter.learn(sequence, slot.num_draft, len(outcome.sampled) - 1)
            self.metrics.drafted(slot.num_draft, len(outcome.sampled) - 1)
        # Between two steps it moves on only over blocks that another sequence computed.
        sequence.local_tokens += first - sequence.num_accounted
        sequence.num_accounted = first + num_rows
        sequence.computed_tokens += max(0, min(first + num_rows, num_given) - first)
        if sequence.phase == "prefill":
            self._publish_progress(sequence)
        elif filled:
            self._handoff.publish(sequence, filled)
        if taken:
            self._emit(sequence, _tokens(sequence, taken))
            self.metrics.generation_tokens.inc(len(taken))
            if sequence.finish_reason or sequence.phase == "prefill":
                self._close(sequence, now)
            else:
                sequence.timeline.enter("decode", now)

    def _publish_progress(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // self._blocks.block_tokens
        if num_full > sequence.num_published:
            self._handoff.publish(sequence, range(sequence.num_published, num_full))
            sequence.num_published = num_full

    def _moved(self, job: Job) -> None:
        """An IO thread is done with some blocks."""
        self.metrics.moved(job.transfers, job.num_failed, job.direction)
        concerned = self._handoff.finish(job)
        for sequence, names in concerned.items():
            if names and sequence.phase == "prefill" and sequence.status is not Status.OVER:
                self._emit(sequence, BlocksPublished(request_id=sequence.request_id, block_keys=names))
            if sequence.status is Status.CLOSING and not sequence.num_publishing:
                self._end(sequence)
        if job.direction == "in" and job.sequence is not None and job.sequence.status is Status.LOADING:
            if job.looked_up_at is not None and (job.moved or job.num_failed):
                job.sequence.timeline.enter("fetch", job.looked_up_at)
            self._run(job.sequence, job)
        if job.sequence is None and (early := self._sequences.get(job.identity)):
            early.transfers += self._handoff.take_prefetched(job.identity)

    def _close(self, sequence: Sequence, now: float) -> None:
        """No more steps: hand over or finish as soon as what was published is acknowledged."""
        if sequence.finish_reason is None:
            num_tokens = sequence.num_tokens - 1
            tail = self._handoff.publish_tail(sequence, num_tokens)
            block_keys = sequence.keys[: num_tokens // self._blocks.block_tokens]
            sequence.handoff = protocol.Handoff(block_keys=block_keys, tail_key=tail, num_tokens=num_tokens)
        self._scheduler.remove(sequence)
        sequence.status = Status.CLOSING
        sequence.timeline.enter("publish", now)
        if sequence.num_publishing:
            # A handoff without its blocks is worthless, a finished answer only lacks a line of its report.
            self._closing[sequence] = now + CLOSING_S if sequence.finish_reason else math.inf
        else:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._forget(sequence)
        report = sequence.report(self.worker_id)
        reason, handoff, request_id = sequence.finish_reason, sequence.handoff, sequence.request_id
        if reason is not None:
            self._emit(sequence, Finished(request_id=request_id, finish_reason=reason, report=report))
        elif handoff is not None:
            self._emit(sequence, Prefilled(request_id=request_id, handoff=handoff, report=report))
        self.metrics.finished(reason or "handoff")

    def _abort(self, sequence: Sequence) -> None:
        if sequence in self._in_step:
            # The kernels write to its blocks at this moment.
            self._late.append(sequence)
            return
        self._scheduler.remove(sequence)
        sequence.finish_reason = "abort"
        self._end(sequence)

    def _fail(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        self._scheduler.remove(sequence)
        self._forget(sequence)
        self._refuse(sequence, code, message)

    def _refuse(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        self._emit(sequence, Failed(request_id=sequence.request_id, code=code, message=message))
        self.metrics.failed(code)

    def _forget(self, sequence: Sequence) -> None:
        sequence.status = Status.OVER
        sequence.timeline.close(self._clock())
        self._closing.pop(sequence, None)
        del self._sequences[sequence.identity]

    def _emit(self, sequence: Sequence, event: FromWorker) -> None:
        self._outbox[sequence.link].append(event)


def _tokens(sequence: Sequence, taken: list[Sampled]) -> Tokens:
    logprobs = [sampled.logprob for sampled in taken if sampled.logprob is not None]
    return Tokens(
        request_id=sequence.request_id,
        token_ids=[sampled.token_id for sampled in taken],
        logprobs=logprobs or None,
    )
