"""One WebSocket to one worker: submits go out, events come in, each handed to the sink that asked for it.

    connecting -> open -> closed          (never reopened: the next connection is a new Link)

Messages queued in one turn of the event loop leave as one link message, and one link message from the worker carries
the tokens of all sequences of an engine step. When the link closes, every open sink learns it at once: that is how a
worker's death is noticed, long before its entry in the directory expires.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from engine.protocol import (
    Cancel,
    Failed,
    Finished,
    FromWorker,
    Prefetch,
    Prefilled,
    Submit,
    decode_from_worker,
    encode,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
PING_INTERVAL_S = 5.0
PING_TIMEOUT_S = 15.0
"""A worker that answers no ping for this long is taken for dead: its process hangs or its machine is gone."""
MAX_CLOSING = 4096
"""Cancelled requests whose last report is still awaited; beyond it the oldest is given up."""


_LAST_WORDS = frozenset({Finished, Failed, Prefilled})
"""Events after which a worker says no more of a request."""


class Channel(Protocol):
    """What a link needs of a connection: whole binary messages, and OSError or EOFError when it is over."""

    async def send(self, data: bytes) -> None:
        """Send one message."""

    async def receive(self) -> bytes:
        """The next message."""


Connect = Callable[[str], AbstractAsyncContextManager[Channel]]
"""Opens a channel to a link URL such as `ws://127.0.0.1:9001/link`."""


class Sink(Protocol):
    """Takes what a worker says of one request."""

    def on_event(self, event: FromWorker) -> None:
        """An event of this request, in the order in which the worker sent it."""

    def on_lost(self) -> None:
        """The link closed before the request was over."""


class _WebSocketChannel:
    def __init__(self, url: str) -> None:
        self._connecting = connect(
            url,
            compression=None,
            max_size=None,
            open_timeout=CONNECT_TIMEOUT_S,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
            close_timeout=1.0,
            proxy=None,
        )

    async def __aenter__(self) -> "_WebSocketChannel":
        self._socket = await self._connecting
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send(data)
        except WebSocketException as error:
            raise EOFError(str(error)) from error

    async def receive(self) -> bytes:
        try:
            message = await self._socket.recv(decode=False)
        except WebSocketException as error:
            raise EOFError(str(error)) from error
        return message if isinstance(message, bytes) else bytes(message)


@asynccontextmanager
async def open_websocket(url: str) -> AsyncIterator[Channel]:
    """Connect to a worker's link. Raises OSError or EOFError when that fails or takes longer than five seconds."""
    channel = _WebSocketChannel(url)
    try:
        await channel.__aenter__()
    except (WebSocketException, TimeoutError) as error:
        raise EOFError(str(error)) from error
    try:
        yield channel
    finally:
        await channel.__aexit__()


class Link:
    """The gateway's end of the connection to one worker."""

    def __init__(self, worker_id: str, url: str, open_channel: Connect = open_websocket) -> None:
        self.worker_id = worker_id
        self.url = url
        self.is_open = False
        self._open_channel = open_channel
        self._sinks: dict[str, Sink] = {}
        self._closing: OrderedDict[str, Sink] = OrderedDict()
        self._outbox: list[Submit | Cancel | Prefetch] = []
        self._wake = asyncio.Event()

    @property
    def num_in_flight(self) -> int:
        """Requests submitted and not over."""
        return len(self._sinks)

    def submit(self, message: Submit, sink: Sink) -> None:
        """Send a request; `sink` gets its events until `Prefilled`, `Finished` or `Failed`, or `on_lost`."""
        self._sinks[message.request_id] = sink
        self._post(message)

    def cancel(self, request_id: str) -> None:
        """Tell the worker to forget a request. Its sink still gets what was made of it meanwhile, and the report."""
        sink = self._sinks.pop(request_id, None)
        if sink is None:
            return
        self._closing[request_id] = sink
        if len(self._closing) > MAX_CLOSING:
            self._closing.popitem(last=False)
        self._post(Cancel(request_id=request_id))

    def prefetch(self, message: Prefetch) -> None:
        """Tell the worker about blocks, and the tokens in them, that a coming request will want."""
        self._post(message)

    async def run(self, on_open: Callable[[], None]) -> None:
        """Connect and serve until the connection ends. Returns the same way whether it broke or was closed."""
        try:
            async with self._open_channel(self.url) as channel:
                self.is_open = True
                on_open()
                sender = asyncio.create_task(self._send_all(channel), name=f"link-send-{self.worker_id}")
                try:
                    while True:
                        self._deliver(await channel.receive())
                finally:
                    sender.cancel()
                    with contextlib.suppress(asyncio.CancelledError, OSError, EOFError):
                        await sender
        except (OSError, EOFError) as error:
            log.info("link to %s ended: %s", self.worker_id, error)
        except msgspec.MsgspecError as error:
            log.error("worker %s does not speak our protocol, link closed: %s", self.worker_id, error)
        finally:
            self.is_open = False
            self._lose_all()

    def _post(self, message: Submit | Cancel | Prefetch) -> None:
        self._outbox.append(message)
        self._wake.set()

    async def _send_all(self, channel: Channel) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            messages, self._outbox = self._outbox, []
            await channel.send(encode(messages))

    def _deliver(self, data: bytes) -> None:
        for event in decode_from_worker(data):
            request_id = event.request_id
            sinks: dict[str, Sink] = self._sinks
            sink = sinks.get(request_id)
            if sink is None:
                # Of a cancelled request, what was on its way still counts: tokens were made, and a report is owed.
                sinks = self._closing
                sink = sinks.get(request_id)
                if sink is None:
                    continue
            if type(event) in _LAST_WORDS:
                del sinks[request_id]
            sink.on_event(event)

    def _lose_all(self) -> None:
        sinks = [*self._sinks.values(), *self._closing.values()]
        self._sinks.clear()
        self._closing.clear()
        for sink in sinks:
            sink.on_lost()
