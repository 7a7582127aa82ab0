"""One choice of a request on its way over workers, as a state machine that only events move (no task of its own).

    begin -> routed -> prefilling -> decoding -> over
                \\-> (aggregated) decoding ----^
    routed, prefilling, decoding -> parked (no worker can take it) -> routed …        over: finished, failed, cancelled

A worker that is lost or declines is avoided and another goes on from the token ids: `generated_tokens` and the seed
carry everything, so the client sees neither a gap nor a repetition.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from app.admission.ticket import Ticket
from app.errors import (
    ContextLengthError,
    DeadlineError,
    GatewayError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from app.requests.mailbox import Mailbox, Produced
from app.requests.record import RequestRecord
from app.requests.trace import Stay
from app.routing.router import Route
from app.routing.workers import Worker
from engine.protocol import (
    BlocksPublished,
    Failed,
    Finished,
    FinishReason,
    FromWorker,
    Handoff,
    Prefetch,
    Prefilled,
    PromptScored,
    Role,
    SamplingParams,
    Submit,
    TokenLogprob,
    Tokens,
)

if TYPE_CHECKING:
    from app.routing.dispatcher import Dispatcher

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""Workers that a choice may lose or break before it is given up: a request that kills workers must not kill all."""


@dataclass(kw_only=True)
class Work:
    """What is to be done for one choice."""

    record: RequestRecord
    mailbox: Mailbox
    choice: int
    leads: bool
    """Whether this choice is the one of its prompt that prefills."""
    prompt_tokens: list[int]
    sampling: SamplingParams
    namespace: str
    cache_salt: str = ""
    num_shared_blocks: int = 0
    block_keys: list[bytes]
    block_tokens: int
    max_context_tokens: int
    kv_bytes_per_token: int
    ticket: Ticket
    uncached_tokens: int
    """Prompt tokens that are to be computed, as far as is known."""
    deadline_at: float | None = None
    prompt_scores: dict[int, TokenLogprob] = field(default_factory=dict)
    """By place in the prompt, where they were asked for: whole before the first token. The choices of a prompt share
    it; the one that leads asks."""


@dataclass(eq=False)
class _Leg:
    """The stay at one worker: the sink of one Submit."""

    dispatch: "Dispatch"
    worker: Worker
    wire_id: str
    phase: Role
    sent_at: float
    num_prompt_tokens: int
    counts_cached: bool
    stay: Stay | None
    """Its place in the request's trace; None when that is not recorded."""

    def on_event(self, event: FromWorker) -> None:
        self.dispatch.on_event(self, event)

    def on_lost(self) -> None:
        self.dispatch.on_lost(self)

    def prompt_is_done(self) -> None:
        """The worker's prefill queue no longer holds this prompt."""
        self.worker.prompt_tokens_sent -= self.num_prompt_tokens
        self.num_prompt_tokens = 0

    def note(self, event: FromWorker | None) -> None:
        """For the trace: the first token and the end; None is the loss of the worker."""
        if self.stay is None:
            return
        now = self.dispatch.dispatcher.clock()
        if isinstance(event, Tokens):
            self.stay.first_token_at = self.stay.first_token_at or now
        elif event is None or isinstance(event, Prefilled | Finished | Failed):
            self.stay.ended_at = now
            if event is None or isinstance(event, Failed):
                self.stay.error = "lost" if event is None else event.code


@dataclass(eq=False)
class Dispatch:
    """Carries one choice. `generated` are its tokens so far, `is_over` says that nothing more will come."""

    dispatcher: "Dispatcher"
    work: Work
    followers: list["Dispatch"] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    is_over: bool = False
    num_late: int = 0
    """Tokens that came when nobody wanted more."""
    _route: Route | None = None
    _leg: _Leg | None = None
    _handoff: Handoff | None = None
    _handed_over: Stay | None = None
    """The stay whose worker handed over, until another one has taken it."""
    _routed_at: float | None = None
    """When the route that nothing was sent on yet began to be looked for."""
    _avoid: list[str] = field(default_factory=list)
    _faults: int = 0
    _attempt: int = 0
    _next: Callable[[], None] | None = None
    _parked_at: float | None = None
    _last_refusal: Literal["lost", "overloaded", "draining"] | None = None

    def begin(self) -> None:
        """Route and send the prompt to prefill, or, aggregated, to the worker that does everything."""
        chosen = self._choose(self.begin)
        if chosen is None:
            return
        if chosen.prefill_worker is None:
            self._send(chosen.decode_worker, "both")
        else:
            self._send(chosen.prefill_worker, "prefill")

    def decode(self) -> None:
        """Go on at a decode worker: the one the route named while it lives, else another."""
        chosen = self._route
        if (
            chosen is None
            or chosen.decode_worker in self._avoid
            or not self.dispatcher.worker(chosen.decode_worker)
        ):
            chosen = self._choose(self.decode)
            if chosen is None:
                return
        self._send(chosen.decode_worker, "decode")

    def follow(self, leader: "Dispatch") -> None:
        """Go on from the KV that another choice of the same prompt has just prefilled."""
        self._route, self._handoff = leader._route, leader._handoff  # noqa: SLF001 - same class
        self.decode()

    @property
    def num_produced(self) -> int:
        """Tokens that workers made for this choice, wanted or not."""
        return len(self.generated) + self.num_late

    def cancel(self) -> None:
        """Nobody wants more of this choice; the worker that holds it frees it."""
        if self.is_over:
            return
        self._close()
        self.followers.clear()
        if self._leg is not None:
            self._leg.prompt_is_done()
            self._leg.worker.link.cancel(self._leg.wire_id)

    def resume(self) -> None:
        """Try again to leave the parking place; give up when patience is over."""
        if self.is_over or self._next is None or self._parked_at is None:
            self.dispatcher.unpark(self)
            return
        again, parked_at, now = self._next, self._parked_at, self.dispatcher.clock()
        self.dispatcher.unpark(self)
        if self.work.deadline_at is not None and now >= self.work.deadline_at and not self.generated:
            self._fail(DeadlineError("the caller's own time limit passed before a worker was free"))
            return
        if now - parked_at >= self.dispatcher.failover_s:
            self._fail(self._refusal())
            return
        self._avoid.clear()
        again()

    def on_event(self, leg: _Leg, event: FromWorker) -> None:
        """What a worker says of this choice; reports count even after the end, nothing else does."""
        leg.note(event)
        if isinstance(event, Tokens):  # most events by far
            if self.is_over:
                self.num_late += len(event.token_ids)
            elif leg is self._leg:
                self._on_tokens(leg, event)
            return
        if isinstance(event, Prefilled | Finished):
            self._note_report(leg, event)
        elif isinstance(event, Failed):
            self.work.record.end_leg()
        if self.is_over or leg is not self._leg:
            return
        match event:
            case PromptScored():
                self.work.prompt_scores.update(enumerate(event.logprobs, event.first))
            case BlocksPublished():
                self._on_published(event)
            case Prefilled():
                self._on_prefilled(leg, event)
            case Finished():
                self._on_finished(leg, event)
            case Failed():
                self._on_failed(leg, event)

    def on_lost(self, leg: _Leg) -> None:
        """The worker died, or its link did: somebody else goes on."""
        leg.note(None)
        self.work.record.end_leg()
        if self.is_over or leg is not self._leg:
            return
        leg.prompt_is_done()
        self._last_refusal = "lost"
        self._go_on_elsewhere(leg)

    def _on_tokens(self, leg: _Leg, event: Tokens) -> None:
        if not self.generated:
            leg.prompt_is_done()
            if self.work.leads:
                self.dispatcher.gate.prompt_done(self.work.ticket, self.work.uncached_tokens)
            self.dispatcher.remember_prefill(leg.worker.record.id, self.work.block_keys)
        self._parked_at = None
        self.generated.extend(event.token_ids)
        reason = self._reason_to_end()
        self.work.mailbox.put(Produced(self.work.choice, event.token_ids, event.logprobs, reason))
        if reason is not None:
            # The worker's Finished comes when its last blocks are published; the answer need not wait for that.
            self._close()
        if leg.phase != "prefill" or reason is not None:
            self._start_followers()

    def _reason_to_end(self) -> FinishReason | None:
        sampling = self.work.sampling
        if self.generated[-1] in sampling.stop_token_ids:
            return "stop"
        num_tokens = len(self.work.prompt_tokens) + len(self.generated)
        full = len(self.generated) >= sampling.max_tokens or num_tokens >= self.work.max_context_tokens
        return "length" if full else None

    def _on_published(self, event: BlocksPublished) -> None:
        route = self._route
        if route is not None and route.prefill_worker is not None:
            decoder = self.dispatcher.worker(route.decode_worker)
            if decoder is not None:
                decoder.link.prefetch(self._prefetch(event.block_keys))

    def _prefetch(self, block_keys: list[bytes]) -> Prefetch:
        """What the decode worker is told of blocks that exist now, first to last of the prompt."""
        work, tokens = self.work, list[int]()
        indices = sorted(work.block_keys.index(key) for key in block_keys)
        for index in indices:
            start = index * work.block_tokens
            tokens += work.prompt_tokens[start : start + work.block_tokens]
        return Prefetch(
            request_id=self._wire_id("decode"),
            block_keys=[work.block_keys[index] for index in indices],
            tokens=tokens,
            namespace=work.namespace,
            num_shared_blocks=sum(index < work.num_shared_blocks for index in indices),
        )

    def _on_prefilled(self, leg: _Leg, event: Prefilled) -> None:
        leg.prompt_is_done()
        self._handoff = event.handoff
        self._handed_over = leg.stay
        self._leg = None
        self.decode()
        self._start_followers()

    def _on_finished(self, leg: _Leg, event: Finished) -> None:
        leg.prompt_is_done()
        self._start_followers()
        self._finish(event.finish_reason)

    def _on_failed(self, leg: _Leg, event: Failed) -> None:
        leg.prompt_is_done()
        if event.code == "expired":
            self._fail(DeadlineError("the request waited longer than its caller does"))
        elif event.code == "too_long":
            self._fail(ContextLengthError(event.message, param="messages"))
        elif event.code == "invalid":
            self._fail(InvalidRequestError(event.message, code="invalid_schema"))
        elif event.code == "internal":
            log.error("worker %s failed %s: %s", leg.worker.record.id, leg.wire_id, event.message)
            self._last_refusal = "lost"
            self._go_on_elsewhere(leg)
        else:
            self._last_refusal = event.code
            self._go_on_elsewhere(leg)

    def _go_on_elsewhere(self, leg: _Leg) -> None:
        self._leg = None
        self._avoid.append(leg.worker.record.id)
        if self._last_refusal == "lost":
            self._faults += 1
            if self._faults >= MAX_FAULTS:
                self._fail(InternalError(f"{self._faults} workers failed while serving this request"))
                return
        self._attempt += 1
        self.work.record.num_retries += 1
        if self.generated:
            self.decode()
        else:
            self.begin()

    def _choose(self, again: Callable[[], None]) -> Route | None:
        work, began_at = self.work, self.dispatcher.clock()
        chosen = self.dispatcher.route(work, self._avoid)
        if chosen is not None:
            self._route, self._routed_at = chosen, began_at
            if work.choice == 0 or work.record.route is None:
                work.record.route = chosen
            return chosen
        self._next = again
        if self._parked_at is None:
            self._parked_at = self.dispatcher.clock()
        self.dispatcher.park(self)
        return None

    def _send(self, worker_id: str, phase: Role) -> None:
        work, now = self.work, self.dispatcher.clock()
        worker = self.dispatcher.worker(worker_id)
        assert worker is not None, "a route names workers that are connected"
        expires_in_s = (
            None if work.deadline_at is None or self.generated else max(0.0, work.deadline_at - now)
        )
        num_prompt_tokens = len(work.prompt_tokens) if phase != "decode" or self._handoff is None else 0
        worker.prompt_tokens_sent += num_prompt_tokens
        counts_cached = work.leads and num_prompt_tokens > 0 and not self.generated
        stay = None
        if work.record.trace is not None:
            stay = work.record.trace.stay(
                phase=phase,
                worker_id=worker_id,
                choice=work.choice,
                routed_at=self._routed_at,
                sent_at=now,
                after=self._handed_over,
            )
            self._handed_over = self._routed_at = None
        self._leg = _Leg(
            self, worker, self._wire_id(phase), phase, now, num_prompt_tokens, counts_cached, stay
        )
        work.record.attempts += 1
        work.record.begin_leg()
        if work.record.status == "queued":
            work.record.status = "running"
        worker.link.submit(
            Submit(
                request_id=self._leg.wire_id,
                phase=phase,
                prompt_tokens=work.prompt_tokens,
                sampling=work.sampling,
                namespace=work.namespace,
                cache_salt=work.cache_salt,
                num_shared_blocks=work.num_shared_blocks,
                generated_tokens=list(self.generated),
                handoff=self._handoff if phase == "decode" else None,
                expires_in_s=expires_in_s,
                priority=work.ticket.priority,
                traceparent="" if stay is None else stay.context.traceparent,
                tracestate="" if stay is None else stay.context.state,
            ),
            self._leg,
        )

    def _wire_id(self, phase: Role) -> str:
        """Unique per choice, attempt and stay, so that late words of an earlier stay cannot be taken for new ones."""
        suffix = "-d" if phase == "decode" else ""
        return f"{self.work.record.request_id}.{self.work.choice}.{self._attempt}{suffix}"

    def _note_report(self, leg: _Leg, event: Prefilled | Finished) -> None:
        record = self.work.record
        record.add_report(event.report, leg.sent_at, self.work.choice)
        if leg.counts_cached:
            record.cached_tokens = (record.cached_tokens or 0) + event.report.cached_tokens
        record.end_leg()

    def _start_followers(self) -> None:
        followers, self.followers = self.followers, []
        for follower in followers:
            if not follower.is_over:
                follower.follow(self)

    def _finish(self, reason: FinishReason) -> None:
        self._close()
        self.work.mailbox.put(Produced(self.work.choice, [], None, reason))

    def _fail(self, error: GatewayError) -> None:
        self._close()
        self.work.mailbox.fail(error)

    def _close(self) -> None:
        self.is_over = True
        self.dispatcher.unpark(self)
        self.dispatcher.gate.choice_over(self.work.ticket, len(self.generated))

    def _refusal(self) -> GatewayError:
        retry_after_s = self.dispatcher.retry_after_s
        if self._last_refusal == "overloaded":
            return OverloadedError("every worker is full; try again shortly", retry_after_s=retry_after_s)
        return UnavailableError(
            "no worker can serve this now; try again shortly", retry_after_s=retry_after_s
        )
