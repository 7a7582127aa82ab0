"""One connection to a Redis server for all tasks of an event loop: commands leave as they come, answers come in order.

redis-py's client takes a connection from a pool, starts a timer and passes through a dozen coroutines for each command.
For the small scripts that a gateway runs for every request that costs more than the network does.
"""

import asyncio
import contextlib
from collections import deque
from typing import Any, cast

import hiredis

from memory_pool.resp import ChannelError, Endpoint, RefusedError

Word = str | bytes | int | float

_NOTHING_YET = object()


class SharedChannel:
    """Connects when it is first used, and anew when the connection was lost."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()

    async def call(self, *words: Word) -> Any:
        """One command's answer. Raises RefusedError when that is an error, ChannelError when none comes."""
        command = _packed(*words)
        try:
            return await (await self._connected()).ask(command)
        except _LostError:
            # Once more at once, for a connection that died while nobody used it.
            return await (await self._connected()).ask(command)

    def close(self) -> None:
        """Idempotent."""
        if self._line is not None:
            self._line.close()

    async def _connected(self) -> "_Line":
        if self._line is not None and not self._line.is_lost:
            return self._line
        async with self._connecting:
            if self._line is None or self._line.is_lost:
                self._line = await self._connect()
            return self._line

    async def _connect(self) -> "_Line":
        endpoint, loop = self._endpoint, asyncio.get_running_loop()

        def new_line() -> _Line:
            return _Line(endpoint.timeout_s)

        try:
            async with asyncio.timeout(endpoint.timeout_s):
                if endpoint.path is not None:
                    _, line = await loop.create_unix_connection(new_line, endpoint.path)
                else:
                    _, line = await loop.create_connection(
                        new_line,
                        endpoint.host,
                        endpoint.port,
                        ssl=endpoint.tls,
                        server_hostname=endpoint.host if endpoint.tls is not None else None,
                    )
        except OSError as error:  # TimeoutError is one
            raise ChannelError(f"{endpoint!r}: {error or 'no connection in time'}") from error
        try:
            if endpoint.password is not None:
                login = [endpoint.username] if endpoint.username else []
                await line.ask(_packed("AUTH", *login, endpoint.password))
            if endpoint.database:
                await line.ask(_packed("SELECT", endpoint.database))
        except BaseException:
            line.close()
            raise
        return line


class _LostError(ChannelError):
    """The connection ended before the answer came."""


class _Line(asyncio.Protocol):
    """A connection, and who waits for its answers."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(notEnoughData=_NOTHING_YET)
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        """In the order of their commands, each with the instant from which its answer is overdue."""
        self._look: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """Send a packed command; its answer, RefusedError or ChannelError."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self.is_lost or self._transport is None:
            answer.set_exception(_LostError("the connection is closed"))
            return answer
        overdue_at = self._loop.time() + self._timeout_s
        self._waiting.append((answer, overdue_at))
        if self._look is None:
            self._look = self._loop.call_at(overdue_at, self._look_at_the_clock)
        self._transport.write(command)
        return answer

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (found := self._reader.gets()) is not _NOTHING_YET:
                answer, _ = self._waiting.popleft()
                if answer.done():  # whoever asked was cancelled
                    continue
                if isinstance(found, hiredis.ReplyError):
                    answer.set_exception(RefusedError(str(found)))
                else:
                    answer.set_result(found)
        except (hiredis.ProtocolError, IndexError) as error:
            self._end(ChannelError(f"the server answers outside the protocol: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(_LostError(str(exc or "the server closed the connection")))

    def close(self) -> None:
        """Nobody wants more answers."""
        self._end(ChannelError("the connection was closed"))

    def _look_at_the_clock(self) -> None:
        """One timer for all: it is set again for whoever has waited longest."""
        self._look = None
        if not self._waiting:
            return
        overdue_at = self._waiting[0][1]
        if self._loop.time() >= overdue_at:
            self._end(ChannelError(f"no answer within {self._timeout_s:g} s"))
        else:
            self._look = self._loop.call_at(overdue_at, self._look_at_the_clock)

    def _end(self, error: ChannelError) -> None:
        self.is_lost = True
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._transport is not None:
            self._transport.abort()
        while self._waiting:
            answer, _ = self._waiting.popleft()
            with contextlib.suppress(asyncio.InvalidStateError):
                answer.set_exception(error)


def _packed(*words: Word) -> bytes:
    packed: bytes = hiredis.pack_command(cast("Any", words))  # its stub knows commands of one word alone
    return packed
