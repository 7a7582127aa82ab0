"""The worker's end of the gateways' WebSockets: messages in, events out.

    accepted -> open -> closed            everything that came over it is cancelled

Events of all requests that are ready when the sender comes round leave as one message; a slow reader delays only
itself.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable

import msgspec
from fastapi import WebSocket, WebSocketDisconnect

from engine.protocol import Cancel, FromWorker, Prefetch, Submit, decode_to_worker, encode

log = logging.getLogger(__name__)

OnMessage = Callable[[str, Submit | Cancel | Prefetch, float], None]
"""Takes the link's name, a message, and the instant (`time.perf_counter`) it came."""

PROTOCOL_ERROR = 1002
"""WebSocket close code for a peer that does not speak the protocol (RFC 6455, section 7.4.1)."""


class _Outbox:
    def __init__(self) -> None:
        self.events: list[FromWorker] = []
        self.wake = asyncio.Event()
        self.sent = asyncio.Event()
        self.sent.set()


class Links:
    """All open links. Its methods belong to the event loop's thread."""

    def __init__(self, *, on_message: OnMessage, on_closed: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._outboxes: dict[str, _Outbox] = {}
        self._numbers = itertools.count()

    @property
    def num_open(self) -> int:
        """Gateways connected now."""
        return len(self._outboxes)

    async def serve(self, socket: WebSocket) -> None:
        """Speak with one gateway until it goes."""
        await socket.accept()
        name = f"link-{next(self._numbers)}"
        outbox = self._outboxes[name] = _Outbox()
        sender = asyncio.create_task(self._send_all(socket, outbox), name=f"{name}-sender")
        try:
            while True:
                messages = decode_to_worker(await socket.receive_bytes())
                received_at = time.perf_counter()
                for message in messages:
                    self._on_message(name, message, received_at)
        except WebSocketDisconnect:
            pass
        except (msgspec.MsgspecError, KeyError) as error:
            # KeyError: a text message where only binary ones are spoken.
            log.error("%s does not speak our protocol, closed: %s", name, error)
            with contextlib.suppress(RuntimeError):
                await socket.close(PROTOCOL_ERROR)
        finally:
            del self._outboxes[name]
            self._on_closed(name)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender

    def send(self, events_by_link: dict[str, list[FromWorker]]) -> None:
        """Queue events; those of a link that has gone are dropped, for nobody waits for them."""
        for name, events in events_by_link.items():
            if outbox := self._outboxes.get(name):
                outbox.events += events
                outbox.sent.clear()
                outbox.wake.set()

    async def flush(self, timeout_s: float) -> None:
        """Wait until all that was queued has been sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for outbox in list(self._outboxes.values()):
                    await outbox.sent.wait()

    async def _send_all(self, socket: WebSocket, outbox: _Outbox) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            while True:
                await outbox.wake.wait()
                outbox.wake.clear()
                events, outbox.events = outbox.events, []
                await socket.send_bytes(encode(events))
                if not outbox.events:
                    outbox.sent.set()
