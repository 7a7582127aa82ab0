"""A request being answered: its choices, its record, and the way from the mailbox to visible pieces.

begin (admit, look up, start every choice) -> pieces … -> end (exactly once, whatever happened)
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec

from app.api.schemas import PromptTokensDetails, Usage
from app.errors import GatewayError, OverloadedError
from app.metrics import GatewayMetrics
from app.requests.choice import Choice, Piece
from app.requests.history import History
from app.requests.mailbox import Abandoned, Mailbox
from app.requests.record import RequestRecord
from app.requests.sampling import choice_seed
from app.requests.served import ServedModel
from app.routing.dispatch import Dispatch, Work
from app.routing.dispatcher import Dispatcher
from app.text import TextStream
from engine.protocol import SamplingParams, WorkerRecord
from memory_pool.client import AsyncPoolClient
from memory_pool.keys import block_keys

NAMESPACE = "default"
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


@dataclass(kw_only=True)
class Generator:
    """Begins generations; holds what they share."""

    dispatcher: Dispatcher
    pool: AsyncPoolClient
    history: History
    metrics: GatewayMetrics

    async def begin(self, order: Order, model: ServedModel, record: RequestRecord) -> "Generation":
        """Admit the request and set its choices going. Raises OverloadedError and UnavailableError."""
        layout = self.dispatcher.layout(model.id)
        try:
            self.dispatcher.admit()
        except OverloadedError:
            self.metrics.rejected("capacity")
            raise
        generation = Generation(self, order, model, record)
        self.history.begin(record)
        try:
            await generation.start(layout)
        except BaseException as error:
            generation.end(error)
            raise
        return generation


@dataclass(eq=False)
class Generation:
    """One request under way. `mailbox` may be ticked or abandoned from outside; `end` must be called."""

    generator: Generator
    order: Order
    model: ServedModel
    record: RequestRecord
    mailbox: Mailbox = field(default_factory=Mailbox)
    choices: list[Choice] = field(default_factory=list)
    _is_ended: bool = False
    _last_at: dict[int, float] = field(default_factory=dict)

    async def start(self, layout: WorkerRecord) -> None:
        """Look up what the pool holds of each prompt and start its choices."""
        record, order = self.record, self.order
        record.model = self.model.id
        record.num_choices = len(order.prompts) * order.n
        record.prompt_tokens = sum(map(len, order.prompts))
        began = time.monotonic()
        keys = [
            block_keys(
                prompt,
                block_tokens=layout.block_tokens,
                fingerprint=layout.fingerprint,
                namespace=NAMESPACE,
            )
            for prompt in order.prompts
        ]
        found = [await self.generator.pool.lookup(chain) for chain in keys]
        record.add_phase("lookup", began, time.monotonic())
        record.predicted_cached_tokens = sum(
            min(number * layout.block_tokens, len(prompt) - 1)
            for number, prompt in zip(found, order.prompts, strict=True)
        )
        for place, prompt in enumerate(order.prompts):
            self._start_prompt(place, prompt, keys[place], layout.block_tokens, layout.kv_bytes_per_token)

    def _start_prompt(
        self, place: int, prompt: list[int], keys: list[bytes], block_tokens: int, kv_bytes_per_token: int
    ) -> None:
        order, sampling = self.order, self.order.sampling[place]
        works = [
            Work(
                record=self.record,
                mailbox=self.mailbox,
                choice=place * order.n + number,
                leads=number == 0,
                prompt_tokens=prompt,
                sampling=sampling
                if number == 0
                else msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, number)),
                namespace=NAMESPACE,
                block_keys=keys,
                block_tokens=block_tokens,
                max_context_tokens=self.model.max_context_tokens,
                kv_bytes_per_token=kv_bytes_per_token,
                deadline_at=order.deadline_at,
            )
            for number in range(order.n)
        ]
        for dispatch in self.generator.dispatcher.start(works):
            self.choices.append(self._choice(dispatch))

    def _choice(self, dispatch: Dispatch) -> Choice:
        tokenizer = self.model.text.tokenizer
        stream = TextStream(tokenizer, self.order.stops, continues_text=self.order.continues_text)
        return Choice(dispatch.work.choice, dispatch, tokenizer, stream)

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
            if pieces or not taken:
                yield pieces

    async def usage(self) -> Usage:
        """Token counts at the end; waits a little for the report that holds the cached tokens."""
        record = self.record
        record.completion_tokens = sum(choice.num_tokens for choice in self.choices)
        if record.cached_tokens is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(record.reported(), REPORT_WAIT_S)
        cached = record.cached_tokens
        return Usage(
            record.prompt_tokens,
            record.completion_tokens,
            record.prompt_tokens + record.completion_tokens,
            None if cached is None else PromptTokensDetails(cached),
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
        generator.dispatcher.release()
        generator.history.end(record)
        record.when_reported(lambda: generator.metrics.observe(record, self.order))

    def _note_tokens(self, choice: int, num_tokens: int) -> None:
        now = time.monotonic()
        if self.record.first_token_at is None:
            self.record.first_token_at = now
        last = self._last_at.get(choice)
        if last is not None:
            self.generator.metrics.inter_token_latency.observe((now - last) / num_tokens, num_tokens)
        self._last_at[choice] = now
