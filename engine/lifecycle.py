"""What becomes of each request inside a worker, from its acceptance to its last event.

    accept ──> queued ──> load ──> loading ──> run ──> running ──> close ──> closing ──> end
       └──> refuse                                        └──> take_in: tokens, full blocks; every step

Every way out (end, abort, fail, refuse) leaves exactly one last event, and no block, queue entry or note behind.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

from engine import protocol
from engine.handoff import Handoff
from engine.metrics import WorkerMetrics
from engine.parcels import Identity, Job
from engine.protocol import BlocksPublished, Failed, Finished, FromWorker, Prefilled, PromptScored, Tokens
from engine.sampler import Sampled
from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status
from engine.spans import spans_of
from engine.speculation import Drafter
from engine.step import Outcome
from observe.traces import Tracer

CLOSING_S = 1.0
"""How long a finished request's report waits for its last published blocks."""

FailureCode = Literal["overloaded", "draining", "expired", "too_long", "invalid", "internal"]


class Lifecycle:
    """The requests of one worker and the events they cause. For the engine thread.

    With `publishes_early` a prompt that is handed over leaves in parts, while the rest is computed.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        max_context_tokens: int,
        scheduler: Scheduler[Sequence],
        handoff: Handoff,
        metrics: WorkerMetrics,
        drafter: Drafter | None,
        clock: Callable[[], float],
        tracer: Tracer | None = None,
        publishes_early: bool = True,
    ) -> None:
        self.sequences: dict[Identity, Sequence] = {}
        self.closing: dict[Sequence, float] = {}
        """Until when each waits for its published blocks."""
        self.in_step: set[Sequence] = set()
        """Those that a step computes at this moment; they are cancelled when it is over."""
        self.outbox: defaultdict[str, list[FromWorker]] = defaultdict(list)
        """Events not yet sent, by link."""
        self._late: list[Sequence] = []
        self._worker_id = worker_id
        self._max_context_tokens = max_context_tokens
        self._scheduler = scheduler
        self._blocks = scheduler.blocks
        self._handoff = handoff
        self._metrics = metrics
        self._drafter = drafter
        self._clock = clock
        self._tracer = tracer
        self._publishes_early = publishes_early

    def take_events(self) -> dict[str, list[FromWorker]]:
        """The events since the last call, by link."""
        events, self.outbox = self.outbox, defaultdict(list)
        return events

    def accept(self, sequence: Sequence, *, is_draining: bool) -> None:
        """Queue a request, or refuse it."""
        if sequence.identity in self.sequences:
            return self._refuse(sequence, "internal", "a request of this id is being served already")
        if is_draining:
            return self._refuse(sequence, "draining", "the worker finishes what it has and takes nothing new")
        room = self._max_context_tokens - 1
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
        self.sequences[sequence.identity] = sequence
        self._scheduler.submit(sequence)
        return None

    def load(self, sequence: Sequence) -> None:
        """Admitted: fetch what is known of its KV, and let it run as soon as that is here."""
        now = self._clock()
        sequence.status = Status.LOADING
        self._metrics.queue_seconds.observe(now - sequence.arrived_at)
        self._metrics.prompt_tokens.inc(sequence.num_prompt)
        self._metrics.prefix_cache_queries.inc(sequence.num_tokens)
        self._metrics.prefix_cache_hits.inc(sequence.num_computed)
        sequence.local_tokens = sequence.num_computed
        if sequence.phase == "prefill":
            # The pool may have lost what is still here; the decode worker will look for it there.
            self._publish_progress(sequence)
        sequence.timeline.enter("fetch" if sequence.handoff else "lookup", now)
        if not self._handoff.load(sequence):
            self._run(sequence, None)

    def take_in(self, outcome: Outcome, now: float) -> None:
        """A step's result: newly filled blocks, new tokens, perhaps the end."""
        slot, sequence = outcome.slot, outcome.slot.work
        if outcome.error is not None:
            self.fail(sequence, outcome.error.code, outcome.error.message)
            return
        first = sequence.num_computed
        if outcome.scored:
            scored = PromptScored(request_id=sequence.request_id, first=first + 1, logprobs=outcome.scored)
            self._emit(sequence, scored)
        # The newest generated token is run to decode, not to make up for KV that was missing.
        num_given = sequence.num_tokens - (1 if sequence.num_generated else 0)
        taken: list[Sampled] = []
        for sampled in outcome.sampled:
            taken.append(sampled)
            if sequence.append(sampled.token_id, max_context_tokens=self._max_context_tokens):
                break
        num_rows = slot.num_rows - slot.num_draft + max(0, len(taken) - 1)
        filled = self._scheduler.commit(sequence, num_rows)
        if self._drafter is not None and slot.num_draft:
            self._drafter.learn(sequence, slot.num_draft, len(outcome.sampled) - 1)
            self._metrics.drafted(slot.num_draft, len(outcome.sampled) - 1)
        # Between two steps it moves on only over blocks that another sequence computed.
        sequence.local_tokens += first - sequence.num_accounted
        sequence.num_accounted = first + num_rows
        sequence.computed_tokens += max(0, min(first + num_rows, num_given) - first)
        if sequence.phase == "prefill":
            # Late where no core is left over: publishing and prefetching would hold up the prompt they are for.
            if taken or self._publishes_early:
                self._publish_progress(sequence)
        else:
            sequence.unpublished += filled
        if taken and sequence.unpublished:
            # Not before the first token: publishing takes processor time from the prompt's own computation.
            self._handoff.publish(sequence, sequence.unpublished)
            sequence.unpublished = []
        if taken:
            self._emit(sequence, _tokens(sequence, taken))
            self._metrics.generation_tokens.inc(len(taken))
            if sequence.finish_reason or sequence.phase == "prefill":
                self._close(sequence, now)
            else:
                sequence.timeline.enter("decode", now)

    def moved(self, job: Job) -> None:
        """An IO thread is done with some blocks."""
        self._metrics.moved(job.transfers, job.num_failed, job.direction)
        concerned = self._handoff.finish(job)
        for sequence, names in concerned.items():
            if names and sequence.phase == "prefill" and sequence.status is not Status.OVER:
                self._emit(sequence, BlocksPublished(request_id=sequence.request_id, block_keys=names))
            if sequence.status is Status.CLOSING and not sequence.num_publishing:
                self.end(sequence)
        if job.direction == "in" and job.sequence is not None and job.sequence.status is Status.LOADING:
            if job.looked_up_at is not None and (job.moved or job.num_failed):
                job.sequence.timeline.enter("fetch", job.looked_up_at)
            self._run(job.sequence, job)
        if job.sequence is None and (early := self.sequences.get(job.identity)):
            early.transfers += self._handoff.take_prefetched(job.identity)

    def abort(self, sequence: Sequence) -> None:
        """Cancel a request: at once, or after the step that computes it."""
        if sequence in self.in_step:
            # The kernels write to its blocks at this moment.
            self._late.append(sequence)
            return
        self._scheduler.remove(sequence)
        sequence.finish_reason = "abort"
        self.end(sequence)

    def abort_late(self) -> None:
        """Cancel what was to be cancelled while a step computed it."""
        late, self._late = self._late, []
        for sequence in late:
            if sequence.status is not Status.OVER:
                self.abort(sequence)

    def preempted(self, sequence: Sequence, now: float) -> None:
        """It gave its blocks back and waits again."""
        sequence.status = Status.QUEUED
        sequence.unpublished = []
        sequence.timeline.enter("queue", now)
        self._metrics.num_preemptions.inc()

    def fail(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        """End a request that cannot be served."""
        self._scheduler.remove(sequence)
        self._forget(sequence)
        self._trace(sequence, code)
        self._refuse(sequence, code, message)

    def end(self, sequence: Sequence) -> None:
        """Send the last event of a request with its report."""
        self._forget(sequence)
        report = sequence.report(self._worker_id)
        reason, handoff, request_id = sequence.finish_reason, sequence.handoff, sequence.request_id
        if reason is not None:
            self._emit(sequence, Finished(request_id=request_id, finish_reason=reason, report=report))
        elif handoff is not None:
            self._emit(sequence, Prefilled(request_id=request_id, handoff=handoff, report=report))
        self._metrics.finished(reason or "handoff")
        self._metrics.prompted(
            num_local=report.local_tokens,
            num_fetched=report.cached_tokens - report.local_tokens,
            num_computed=sequence.num_prompt - report.cached_tokens,
        )
        self._trace(sequence)

    def _run(self, sequence: Sequence, job: Job | None) -> None:
        before = sequence.num_computed
        self._scheduler.start(sequence)
        sequence.status = Status.RUNNING
        if job is not None:
            self._take_tail(sequence, job)
            self._metrics.external_queries.inc(sequence.num_tokens - before)
            self._metrics.external_hits.inc(sequence.num_computed - before)
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

    def _publish_progress(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // self._blocks.block_tokens
        if num_full > sequence.num_published:
            self._handoff.publish(sequence, range(sequence.num_published, num_full))
            sequence.num_published = num_full

    def _close(self, sequence: Sequence, now: float) -> None:
        """No more steps: hand over or finish as soon as what was published is acknowledged."""
        if sequence.finish_reason is None:
            num_tokens = sequence.num_tokens - 1
            tail = self._handoff.publish_tail(sequence, num_tokens)
            block_keys = sequence.keys[: num_tokens // self._blocks.block_tokens]
            sequence.handoff = protocol.Handoff(
                block_keys=block_keys, tail_key=tail, num_tokens=num_tokens, lease=sequence.lease
            )
        self._scheduler.remove(sequence)
        sequence.status = Status.CLOSING
        sequence.timeline.enter("publish", now)
        if sequence.num_publishing:
            # A handoff without its blocks is worthless, a finished answer only lacks a line of its report.
            self.closing[sequence] = now + CLOSING_S if sequence.finish_reason else math.inf
        else:
            self.end(sequence)

    def _refuse(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        self._emit(sequence, Failed(request_id=sequence.request_id, code=code, message=message))
        self._metrics.failed(code)

    def _forget(self, sequence: Sequence) -> None:
        sequence.status = Status.OVER
        sequence.timeline.close(self._clock())
        self.closing.pop(sequence, None)
        del self.sequences[sequence.identity]

    def _trace(self, sequence: Sequence, error: str | None = None) -> None:
        if self._tracer is not None and sequence.traceparent:
            spans = spans_of(sequence, sequence.report(self._worker_id), error)
            self._tracer.record(spans, self._clock())

    def _emit(self, sequence: Sequence, event: FromWorker) -> None:
        self.outbox[sequence.link].append(event)


def _tokens(sequence: Sequence, taken: list[Sampled]) -> Tokens:
    logprobs = [sampled.logprob for sampled in taken if sampled.logprob is not None]
    return Tokens(
        request_id=sequence.request_id,
        token_ids=[sampled.token_id for sampled in taken],
        logprobs=logprobs or None,
    )
