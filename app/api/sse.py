"""Server-sent events as the OpenAI SDKs read them: `data: …` and a blank line, comments to keep alive, no `id:`.

The status line waits for the first piece, so that a request which fails before it gets a plain error answer; if the
first piece is slow, the headers and a comment go out instead, and a later failure becomes an error event.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.schemas import Usage
from app.errors import GatewayError
from app.requests.choice import Piece
from app.requests.generation import Generation
from app.requests.mailbox import Abandoned, Mailbox

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ChunkFormat(Protocol):
    """How an endpoint writes its chunks: complete events, blank line included."""

    done: bytes = DONE
    """What comes last of a stream that did not fail."""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The events of some pieces."""

    def usage(self, usage: Usage) -> bytes:
        """The last chunk, with the totals."""

    def failure(self, error: GatewayError) -> bytes:
        """A failure in the middle of the stream."""
        return error_event(error)


def error_event(error: GatewayError) -> bytes:
    """A failure in the middle of a stream; the SDKs raise APIError on it."""
    return b"data: " + error.encode() + b"\n\n"


async def watch_disconnect(receive: Receive, mailbox: Mailbox) -> None:
    """Abandon the mailbox when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.abandon()


class Pulse:
    """Ticks the mailboxes of quiet streams; one task for all of them."""

    def __init__(self) -> None:
        self._intervals: dict[Mailbox, float] = {}

    def watch(self, mailbox: Mailbox, interval_s: float) -> None:
        """Tick `mailbox` whenever its reader has been given nothing for `interval_s`."""
        self._intervals[mailbox] = interval_s

    def forget(self, mailbox: Mailbox) -> None:
        """Tick it no more."""
        self._intervals.pop(mailbox, None)

    async def run(self, period_s: float = 0.1) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            now = time.monotonic()
            for mailbox, interval_s in list(self._intervals.items()):
                if now - mailbox.taken_at >= interval_s:
                    mailbox.tick()


class EventStream(Response):
    """Answers with the pieces of a generation as they come; ends it, whatever happens."""

    def __init__(
        self,
        generation: Generation,
        chunks: ChunkFormat,
        *,
        include_usage: bool,
        pulse: Pulse,
        keep_alive_s: float,
        describe: Callable[[Exception], GatewayError],
    ) -> None:
        super().__init__()
        self._generation = generation
        self._chunks = chunks
        self._include_usage = include_usage
        self._pulse = pulse
        self._keep_alive_s = keep_alive_s
        self._describe = describe

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream as an ASGI application."""
        generation = self._generation
        mailbox = generation.mailbox
        watcher = asyncio.create_task(watch_disconnect(receive, mailbox))
        self._pulse.watch(mailbox, self._keep_alive_s)
        started, failure = False, None
        try:
            async for data in self._events():
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
                    started = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
            generation.end()
        except Abandoned as gone:
            generation.end(gone)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an event or an answer
            failure = self._describe(error)
            generation.end(failure)
        except asyncio.CancelledError as cancelled:
            generation.end(cancelled)
            raise
        finally:
            self._pulse.forget(mailbox)
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        await self._close(send, started, failure)

    async def _events(self) -> AsyncIterator[bytes]:
        async for pieces in self._generation.pieces():
            yield self._chunks.pieces(pieces) if pieces else KEEP_ALIVE
        usage = self._chunks.usage(await self._generation.usage()) if self._include_usage else b""
        yield usage + self._chunks.done

    async def _close(self, send: Send, started: bool, failure: GatewayError | None) -> None:
        if failure is not None and not started:
            body = failure.encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send(
                {
                    "type": "http.response.start",
                    "status": failure.status,
                    "headers": headers + failure.headers(),
                }
            )
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        body = b"" if failure is None else self._chunks.failure(failure)
        await send({"type": "http.response.body", "body": body, "more_body": False})
