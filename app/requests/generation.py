"""A request being answered: its choices, its record, and the way from the mailbox to visible pieces.

begin (admit, look up, start every choice) -> pieces … -> end (exactly once, whatever happened)
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from app.admission.gate import Gate
from app.admission.ticket import DEFAULT_TENANT, Ticket
from app.api.schemas import PromptTokensDetails, Usage
from app.errors import GatewayError
from app.metrics import GatewayMetrics
from app.requests.calls import CallReader
from app.requests.chain import Chain, chain_of
from app.requests.choice import Choice, Piece
from app.requests.history import History
from app.requests.mailbox import Abandoned, Mailbox
from app.requests.record import RequestRecord
from app.requests.request_log import RequestLog, log_end
from app.requests.sampling import choice_seed
from app.requests.served import ServedModel
from app.requests.trace import RequestTrace
from app.routing.dispatch import Dispatch, Work
from app.routing.dispatcher import Dispatcher
from app.tenancy.limits import spare_tokens
from app.tenancy.principal import Principal, caller
from app.tenancy.tenancy import Account, Tenancy
from app.text import TextStream
from engine.protocol import SamplingParams, TokenLogprob, WorkerRecord
from memory_pool.async_client import AsyncPoolClient
from memory_pool.keys import DEFAULT_NAMESPACE
from observe.traces import Attribute, Tracer, context_of, incoming

REPORT_WAIT_S = 1.5
"""How long the usage of an ended answer waits for the worker's word on cached tokens."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to generate: `n` choices of each prompt."""

    prompts: Sequence[list[int]]
    sampling: Sequence[SamplingParams]
    """One per prompt, with the seed of its first choice."""
    n: int
    stops: Sequence[str]
    continues_text: bool
    deadline_at: float | None
    namespace: str = DEFAULT_NAMESPACE
    """Whose blocks these are: `memory_pool.keys.namespace_of` of the caller's tenant."""
    cache_salt: str = ""
    """The caller's own: only requests with the same one find these blocks."""
    tenant: str = DEFAULT_TENANT
    """Whose share of the workers it takes from."""
    weight: float = 1.0
    """Of that share."""
    tier: int = 0
    """Set by the operator: lower tiers go before all others."""
    priority: int = 0
    """The caller's own order among its requests, lower first."""
    names_max_tokens: bool = True
    """Whether the caller said how long the answer may be."""
    offers_tools: bool = False
    """Whether answers may hold calls of tools."""
    drops_answers: bool = False
    """Whether nothing but the prompts is wanted: the one token that a worker cannot but make is dropped."""


def asked(order: Order) -> dict[str, Attribute]:
    """What a trace tells of an order, in OpenTelemetry's names: how to generate, never what was said."""
    sampling = order.sampling[0]
    told: dict[str, Attribute] = {
        "gen_ai.request.choice.count": order.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
    }
    return told | ({"gen_ai.request.top_k": sampling.top_k} if sampling.top_k else {})


@dataclass(kw_only=True)
class Generator:
    """Begins generations; holds what they share."""

    dispatcher: Dispatcher
    gate: Gate
    pool: AsyncPoolClient
    history: History
    metrics: GatewayMetrics
    tenancy: Tenancy
    tracer: Tracer | None = None
    request_log: RequestLog | None = None

    def check(
        self,
        record: RequestRecord,
        model: ServedModel,
        *,
        prompt_tokens: int,
        num_sequences: int,
        priority: int,
        deadline_at: float | None,
    ) -> None:
        """Turn away a request that would be refused with `prompt_tokens`, the fewest it may have: before its text is
        made tokens, which costs more than all the rest of a refusal. Raises OverloadedError and DeadlineError."""
        who = caller()
        ticket = Ticket(
            tenant=who.tenant_id,
            weight=who.weight,
            tier=who.tier,
            priority=priority,
            prompt_tokens=prompt_tokens,
            output_tokens=num_sequences,
            num_sequences=num_sequences,
            arrived_at=record.arrived_at,
            deadline_at=deadline_at,
        )
        try:
            self.gate.check(ticket)
        except GatewayError as error:
            record.model, record.tenant, record.trace = model.id, who.tenant_id, self._new_trace({})
            self._turn_away(record, error)
            raise

    async def begin(self, order: Order, model: ServedModel, record: RequestRecord) -> "Generation":
        """Queue the request; its choices go as soon as there is room. Raises OverloadedError, DeadlineError,
        UnavailableError, and RateLimitError when the caller has none left."""
        layout = self.dispatcher.layout(model.id)
        order = for_caller(order, caller(), model.id, self.tenancy.limited_max_tokens)
        record.model = model.id
        record.tenant = order.tenant
        record.prompt_tokens = sum(map(len, order.prompts))
        ticket = new_ticket(order, record.arrived_at)
        record.trace = self._new_trace(asked(order))
        try:
            account = await self._admit(record, ticket)
        except GatewayError as error:
            self._turn_away(record, error)
            raise
        generation = Generation(self, order, model, record, ticket, account)
        self.history.begin(record)
        try:
            await generation.start(layout)
        except BaseException as error:
            generation.end(error)
            raise
        return generation

    def _new_trace(self, asked: Mapping[str, Attribute]) -> RequestTrace | None:
        context = None if self.tracer is None else context_of(*incoming.get())
        return None if context is None else RequestTrace(context, asked)

    def _turn_away(self, record: RequestRecord, error: GatewayError) -> None:
        record.end("failed", time.monotonic(), error.message)
        self.over(record, (), 0)

    async def _admit(self, record: RequestRecord, ticket: Ticket) -> Account:
        account = await self.tenancy.admit(
            record, record.model, prompt_tokens=record.prompt_tokens, output_tokens=ticket.output_tokens
        )
        try:
            self.gate.check(ticket)
        except BaseException:
            account.cancel()
            raise
        return account

    def over(self, record: RequestRecord, block_keys: Sequence[Sequence[bytes]], block_tokens: int) -> None:
        """Nothing more will be known of a request: trace it and log it, where that is wanted."""
        if self.tracer is not None and record.trace is not None:
            now = time.monotonic()
            self.tracer.record(record.trace.spans(record, now), now)
        log_end(record)
        if self.request_log is not None:
            self.request_log.write(record, block_keys, block_tokens)


@dataclass(eq=False)
class Generation:
    """One request under way. `mailbox` may be ticked or abandoned from outside; `end` must be called."""

    generator: Generator
    order: Order
    model: ServedModel
    record: RequestRecord
    ticket: Ticket
    account: Account
    mailbox: Mailbox = field(default_factory=Mailbox)
    choices: list[Choice] = field(default_factory=list)
    block_keys: list[list[bytes]] = field(default_factory=list)
    """Names of each prompt's full blocks."""
    block_tokens: int = 0
    _is_ended: bool = False
    _last_at: dict[int, float] = field(default_factory=dict)

    async def start(self, layout: WorkerRecord) -> None:
        """Look up what the pool holds of each prompt and start its choices."""
        record, order = self.record, self.order
        record.num_choices = len(order.prompts) * order.n
        began = time.monotonic()
        pool = self.generator.pool
        prefixes = await pool.shared_prefixes()
        chains = [
            chain_of(prompt, layout, prefixes, namespace=order.namespace, salt=order.cache_salt)
            for prompt in order.prompts
        ]
        self.block_keys, self.block_tokens = [chain.keys for chain in chains], layout.block_tokens
        found = [
            # What each prompt's tokens score takes computing them, whatever the pool has.
            0
            if sampling.prompt_logprobs is not None
            else await pool.lookup(chain.keys, order.namespace, num_shared_blocks=chain.num_shared_blocks)
            for chain, sampling in zip(chains, order.sampling, strict=True)
        ]
        record.add_phase("lookup", began, time.monotonic())
        record.predicted_cached_tokens = sum(
            min(number * layout.block_tokens, len(prompt) - 1)
            for number, prompt in zip(found, order.prompts, strict=True)
        )
        self.ticket.prompt_tokens = record.prompt_tokens - record.predicted_cached_tokens
        leaders = [
            self._prepare(place, prompt, chains[place], found[place], layout)
            for place, prompt in enumerate(order.prompts)
        ]
        self.generator.gate.enter(self.ticket, lambda: self._go(leaders), self.mailbox.fail)

    def _go(self, leaders: Sequence[Dispatch]) -> None:
        self.record.add_phase("queue", self.ticket.queued_at, self.ticket.released_at)
        for leader in leaders:
            leader.begin()

    def _prepare(
        self, place: int, prompt: list[int], chain: Chain, num_found: int, layout: WorkerRecord
    ) -> Dispatch:
        """The choices of one prompt, ready to begin; the one that prefills for all."""
        order, sampling = self.order, self.order.sampling[place]
        self.record.kv_bytes_per_token = layout.kv_bytes_per_token
        prompt_scores: dict[int, TokenLogprob] = {}
        works = [
            Work(
                record=self.record,
                mailbox=self.mailbox,
                choice=place * order.n + number,
                leads=number == 0,
                prompt_tokens=prompt,
                sampling=sampling
                if number == 0
                else msgspec.structs.replace(
                    sampling, seed=choice_seed(sampling.seed, number), prompt_logprobs=None
                ),
                namespace=order.namespace,
                cache_salt=order.cache_salt,
                num_shared_blocks=chain.num_shared_blocks,
                block_keys=chain.keys,
                block_tokens=layout.block_tokens,
                max_context_tokens=self.model.max_context_tokens,
                kv_bytes_per_token=layout.kv_bytes_per_token,
                ticket=self.ticket,
                uncached_tokens=max(1, len(prompt) - num_found * layout.block_tokens),
                deadline_at=order.deadline_at,
                prompt_scores=prompt_scores,
            )
            for number in range(order.n)
        ]
        dispatches = self.generator.dispatcher.prepare(works)
        self.choices += map(self._choice, dispatches)
        return dispatches[0]

    def _choice(self, dispatch: Dispatch) -> Choice:
        tokenizer = self.model.text.tokenizer
        stream = TextStream(tokenizer, self.order.stops, continues_text=self.order.continues_text)
        calls = CallReader() if self.order.offers_tools else None
        return Choice(
            dispatch.work.choice, dispatch, tokenizer, stream, calls, drops_tokens=self.order.drops_answers
        )

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Visible pieces as they come, several at a time; an empty list after a tick. Ends with the last choice.

        Raises GatewayError when the request fails, Abandoned when the client is gone.
        """
        num_open = len(self.choices)
        while num_open:
            pieces: list[Piece] = []
            taken = await self.mailbox.take()
            for produced in taken:
                if produced.token_ids:
                    self._note_tokens(produced.choice, len(produced.token_ids))
                piece = self.choices[produced.choice].take(produced)
                if piece is None:
                    continue
                pieces.append(piece)
                if piece.finish_reason is not None:
                    num_open -= 1
                    self.record.finish_reasons[piece.choice] = piece.finish_reason
            if not num_open:
                # Before the client sees the end of its answer: from here on it is in the ledger, come what may.
                self.account.note(self._num_tokens())
            if pieces or not taken:
                yield pieces

    async def usage(self) -> Usage:
        """Token counts at the end; waits a little for the report that holds the cached tokens."""
        record = self.record
        record.completion_tokens = sum(choice.num_tokens for choice in self.choices)
        if record.cached_tokens is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_WAIT_S):
                    await record.reported()
        cached = record.cached_tokens
        return Usage(
            record.prompt_tokens,
            record.completion_tokens,
            record.prompt_tokens + record.completion_tokens,
            None if cached is None else PromptTokensDetails(cached, record.written_tokens or 0),
        )

    def end(self, error: BaseException | None = None) -> None:
        """Free what is still held and close the record; later calls do nothing."""
        if self._is_ended:
            return
        self._is_ended = True
        for choice in self.choices:
            choice.dispatch.cancel()
        record, generator = self.record, self.generator
        record.completion_tokens = sum(choice.num_tokens for choice in self.choices)
        now = time.monotonic()
        if error is None:
            record.end("completed", now)
        elif isinstance(error, Abandoned | asyncio.CancelledError):
            record.end("cancelled", now)
        elif isinstance(error, GatewayError):
            record.end("failed", now, error.message)
        else:
            record.end("failed", now, "internal error")
        generator.gate.leave(self.ticket)
        generator.history.end(record)
        record.when_reported(self._on_reported)

    def _on_reported(self) -> None:
        self.generator.metrics.observe(self.record, self.order)
        self.generator.over(self.record, self.block_keys, self.block_tokens)
        if self.record.status == "failed" and not self._num_tokens():
            self.account.cancel()
        else:
            self.account.enter(self.record.status, self._num_tokens())

    def _num_tokens(self) -> int:
        """Tokens to be charged: those of each answer that ended, and of one that was cut off all that were made."""
        return sum(
            choice.dispatch.num_produced if choice.finish_reason is None else choice.num_tokens
            for choice in self.choices
        )

    def _note_tokens(self, choice: int, num_tokens: int) -> None:
        now = time.monotonic()
        if self.record.first_token_at is None:
            self.record.first_token_at = now
        last = self._last_at.get(choice)
        if last is not None:
            self.generator.metrics.inter_token_latency.observe((now - last) / num_tokens, num_tokens)
            self.generator.gate.streamed(now - last, num_tokens)
        self._last_at[choice] = now


def for_caller(order: Order, who: Principal, model: str, limited_max_tokens: int) -> Order:
    """The order under its caller's name. An answer of unnamed length reserves no more than a token limit can hold."""
    sampling = order.sampling
    if not order.names_max_tokens and who.is_metered(model):
        most, spare = limited_max_tokens, spare_tokens(who.limits, model)
        if spare is not None:
            most = min(most, max(1, (spare - sum(map(len, order.prompts))) // max(1, order.n)))
        sampling = [msgspec.structs.replace(each, max_tokens=min(each.max_tokens, most)) for each in sampling]
    return replace(
        order,
        sampling=sampling,
        tenant=who.tenant_id,
        namespace=who.namespace,
        weight=who.weight,
        tier=who.tier,
    )


def new_ticket(order: Order, arrived_at: float) -> Ticket:
    """An order's place in the queue, before it is known what of its prompts is cached."""
    return Ticket(
        tenant=order.tenant,
        weight=order.weight,
        tier=order.tier,
        priority=order.priority,
        prompt_tokens=sum(map(len, order.prompts)),
        output_tokens=order.n * sum(sampling.max_tokens for sampling in order.sampling),
        num_sequences=order.n * len(order.prompts),
        arrived_at=arrived_at,
        deadline_at=order.deadline_at,
    )
