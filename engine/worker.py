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
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.carrier import Pool
from engine.courtesy import Courtesy
from engine.grammar import Masks
from engine.handoff import Handoff
from engine.lifecycle import Lifecycle
from engine.metrics import WorkerMetrics
from engine.parcels import Identity, Job
from engine.protocol import FromWorker, Prefetch
from engine.scheduler import Limits, Plan, Scheduler
from engine.sequence import Sequence
from engine.speculation import Drafter
from engine.step import Forward, Outcome, run_step
from observe.traces import Tracer

log = logging.getLogger(__name__)

ATTENDED_ROWS = 8
"""Steps of fewer rows are over before handing them to another thread would pay."""
_TICK_S = 0.05
"""How often an idle loop looks at the clock while something can time out."""

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
    fit into `num_blocks` blocks. Without a `drafter` each step gives one token, without
    `courtesy` the worker never steps back for its neighbours. With `publishes_early` KV to be handed over leaves while
    the rest of its prompt is computed, without only after the first token. All instants are of `clock`.
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
        courtesy: Courtesy | None = None,
        tracer: Tracer | None = None,
        publishes_early: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.worker_id = worker_id
        self.max_context_tokens = min(max_context_tokens, num_blocks * block_tokens)
        self.metrics = metrics
        self.is_draining = False
        self._forward = forward
        self._deliver = deliver
        self._drafter = drafter
        self._courtesy = courtesy
        self._clock = clock
        self._blocks = BlockManager(num_blocks, block_tokens)
        self._scheduler: Scheduler[Sequence] = Scheduler(self._blocks, limits)
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._handoff = Handoff(
            pool,
            self._blocks,
            memory,
            place=place,
            done=self._inbox.put,
            clock=clock,
            compute_s=self._scheduler.step_time.prefill_s,
        )
        self._requests = Lifecycle(
            worker_id=worker_id,
            max_context_tokens=self.max_context_tokens,
            scheduler=self._scheduler,
            handoff=self._handoff,
            metrics=metrics,
            drafter=drafter,
            clock=clock,
            tracer=tracer,
            publishes_early=publishes_early,
        )
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._masks = Masks()
        self._is_stopped = False
        metrics.laid_out(block_tokens=self._blocks.block_tokens, num_blocks=num_blocks)
        metrics.watch(
            running=lambda: self.load().running,
            waiting=lambda: self.load().waiting,
            loading=lambda: len(self._scheduler.loading),
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
        """Whether nothing is left to do or to send for anyone."""
        requests = self._requests
        return not (requests.sequences or requests.outbox or self._handoff.num_jobs) and self._inbox.empty()

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
        self._masks.close()

    def turn(self) -> bool:
        """One round of the loop; whether there was anything to do."""
        busy = self._receive()
        busy |= self._expire()
        busy |= self._admit()
        busy |= self._step(self._plan())
        self._send()
        return busy

    def _wait(self) -> None:
        can_time_out = self._requests.closing or any(
            w.expires_at is not None for w in self._scheduler.waiting
        )
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
            self._requests.fail(sequence, "expired", "the request waited longer than its deadline allows")
        late = [sequence for sequence, deadline in self._requests.closing.items() if deadline <= now]
        for sequence in late:
            self._requests.end(sequence)
        return bool(expired or late)

    def _admit(self) -> bool:
        admitted = self._scheduler.admit(self._handoff.arriving)
        for sequence in admitted:
            self._requests.load(sequence)
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
            self._requests.preempted(sequence, started_at)
        if not plan.slots:
            return bool(plan.preempted)
        if self._courtesy is not None:
            prompts = [sequence for sequence in self._scheduler.running if sequence.num_uncomputed > 1]
            self._courtesy.before(prompts, plan.num_decode)
        try:
            outcomes = self._compute(plan)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(plan.slots))
            for slot in plan.slots:
                self._requests.fail(slot.work, "internal", f"the engine failed: {error}")
            return True
        now = self._clock()
        self._scheduler.step_time.observe(
            plan.num_decode, plan.num_prefill, plan.num_attended, now - started_at
        )
        if self._drafter is not None and not plan.num_prefill:
            self._drafter.costs.observe(plan.num_decode, now - started_at)
        self.metrics.stepped(plan.num_decode + plan.num_prefill, now - started_at)
        for outcome in outcomes:
            self._requests.take_in(outcome, now)
        self._requests.abort_late()
        return True

    def _compute(self, plan: Plan[Sequence]) -> list[Outcome]:
        """Run a step. While a long one is computed messages are attended to, so that KV moves and handoffs leave."""
        if plan.num_decode + plan.num_prefill < ATTENDED_ROWS:
            return run_step(self._forward, plan, self._masks)
        computing = self._computing.submit(run_step, self._forward, plan, self._masks)
        computing.add_done_callback(lambda _: self._inbox.put(_StepDone()))
        self._requests.in_step = {slot.work for slot in plan.slots}
        while not computing.done():
            self._take(self._inbox.get())
            self._admit()
            self._send()
        self._requests.in_step = set()
        return computing.result()

    def _send(self) -> None:
        if events := self._requests.take_events():
            self._deliver(events)

    # Messages.

    def _take(self, message: _Message) -> None:
        match message:
            case Sequence():
                self._requests.accept(message, is_draining=self.is_draining)
            case Job():
                self._requests.moved(message)
            case _Prefetch(identity, wanted):
                if not self.is_draining:
                    self._handoff.prefetch(identity, wanted)
            case _Cancel():
                self._handoff.take_prefetched(message.identity)
                if sequence := self._requests.sequences.get(message.identity):
                    self._requests.abort(sequence)
            case _LinkClosed():
                self._handoff.forget_link(message.link)
                for sequence in [s for s in self._requests.sequences.values() if s.link == message.link]:
                    self._requests.abort(sequence)
            case _StepDone():
                pass  # it has done its work by waking the loop
            case _Stop():
                self._is_stopped = True
