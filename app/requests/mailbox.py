"""Where the dispatcher leaves what was produced and the answering task picks it up, everything at once."""

import asyncio
import time
from typing import NamedTuple

from app.errors import GatewayError
from engine.protocol import FinishReason, TokenLogprob


class Produced(NamedTuple):
    """New tokens of a choice, and, with its last ones, why it ended."""

    choice: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None


class Mailbox:
    """One reader, any number of writers on the same event loop."""

    __slots__ = ("_error", "_is_abandoned", "_items", "_tick", "_waiter", "taken_at")

    def __init__(self) -> None:
        self._items: list[Produced] = []
        self._error: GatewayError | None = None
        self._is_abandoned = False
        self._tick = False
        self._waiter: asyncio.Future[None] | None = None
        self.taken_at = time.monotonic()
        """When the reader was last given something, or nothing by a tick."""

    def put(self, item: Produced) -> None:
        """Leave something for the reader."""
        self._items.append(item)
        self._wake()

    def fail(self, error: GatewayError) -> None:
        """The reader will raise `error`, after what was left before."""
        self._error = self._error or error
        self._wake()

    def abandon(self) -> None:
        """The client is gone: the reader will raise Abandoned at once."""
        self._is_abandoned = True
        self._wake()

    def tick(self) -> None:
        """Wake the reader with nothing."""
        self._tick = True
        self._wake()

    async def take(self) -> list[Produced]:
        """Everything left since the last take, at least one item, or none after a tick.

        Raises the error given to `fail`, and Abandoned.
        """
        while True:
            if self._is_abandoned:
                raise Abandoned
            if self._items:
                items, self._items = self._items, []
                self.taken_at = time.monotonic()
                return items
            if self._error is not None:
                raise self._error
            if self._tick:
                self._tick = False
                self.taken_at = time.monotonic()
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Abandoned(Exception):  # noqa: N818 - not an error: somebody left
    """The client disconnected; nobody waits for the answer."""
