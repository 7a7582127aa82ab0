"""A streaming HTTP client that takes as little of a small machine as it can: while a request runs it only stores
(time, bytes), and what the bytes mean is worked out when the request is over."""

import asyncio
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
RETRY_AFTER = re.compile(rb"\r\nretry-after-ms: *(\d+)\r\n", re.IGNORECASE)


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it; instants are of this process's monotonic clock.

    `error` is None for an answer that came whole: status 200, text, a finish reason, and `[DONE]`.
    """

    started_at: float
    ended_at: float = 0.0
    first_at: float | None = None
    last_at: float | None = None
    """When the first and the last piece of text arrived."""
    status: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    retry_after_s: float | None = None
    """When a refusal said to come back."""
    text: str = ""
    error: str | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Times between pieces of text."""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending the request."""
        return None if self.first_at is None else self.first_at - self.started_at

    @property
    def e2e_s(self) -> float:
        """Time to the last byte."""
        return self.ended_at - self.started_at

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if (
            self.first_at is None
            or self.last_at is None
            or self.output_tokens is None
            or self.output_tokens < 2
        ):
            return None
        return (self.last_at - self.first_at) / (self.output_tokens - 1)


class _Connection(asyncio.Protocol):
    """One connection to the server, for one exchange after another."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_lost = False
        self._pieces: list[tuple[float, bytes]] = []
        self._head = b""
        self._missing_bytes: int | None = None
        """Of a body whose length was declared."""
        self._whole: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        at = time.perf_counter()
        if not self._is_headed():
            self._head += data
            if not self._is_headed():
                return
            self._head, _, data = self._head.partition(HEAD_END)
            self._head += HEAD_END
            length = CONTENT_LENGTH.search(self._head)
            self._missing_bytes = None if length is None else int(length[1])
        if data:
            self._pieces.append((at, data))
        if self._missing_bytes is not None:
            self._missing_bytes -= len(data)
        if self._is_whole():
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._whole is not None and not self._whole.done():
            # A body of no declared length ends with its connection.
            if self._is_headed() and not self._is_chunked() and self._missing_bytes is None:
                self._end()
            else:
                self._whole.set_exception(exc or ConnectionResetError("the connection was closed"))

    async def exchange(self, request: bytes) -> tuple[bytes, list[tuple[float, bytes]]]:
        """Head and body of the answer. Raises OSError when the connection ends before it is whole."""
        assert self.transport is not None
        self._pieces, self._head, self._missing_bytes = [], b"", None
        self._whole = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._whole
        pieces = list(_dechunk(self._pieces)) if self._is_chunked() else self._pieces
        return self._head, pieces

    @property
    def has_answered(self) -> bool:
        """Whether any of an answer has come since the last request was sent."""
        return bool(self._head)

    @property
    def may_be_kept(self) -> bool:
        """Whether another request may follow."""
        return not self.is_lost and b"connection: close" not in self._head.lower()

    def close(self) -> None:
        """Nothing more is wanted of it."""
        if self.transport is not None:
            self.transport.abort()

    def _end(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def _is_headed(self) -> bool:
        return HEAD_END in self._head

    def _is_chunked(self) -> bool:
        return b"transfer-encoding: chunked" in self._head.lower()

    def _is_whole(self) -> bool:
        if self._missing_bytes is not None:
            return self._missing_bytes <= 0
        if not self._is_chunked() or not self._pieces:
            return False
        # The end of the last chunk may itself come in two pieces.
        tail = b"".join(data for _, data in self._pieces[-len(LAST_CHUNK) :])
        # What looks like it may stand in the middle of a body, too: only then all of it is looked through.
        return tail.endswith(LAST_CHUNK) and _is_complete(self._pieces)


class StreamingClient:
    """Posts JSON to one server: a connection a request, or, with `keeps_connections`, as the SDKs do, one after
    another over the same connections, which `close` ends. Then it is for one event loop."""

    def __init__(
        self, base_url: str, *, api_key: str | None, timeout_s: float, keeps_connections: bool = False
    ) -> None:
        parts = urlsplit(base_url if "://" in base_url else "http://" + base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url {base_url!r}: expected something like http://127.0.0.1:8000")
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        path = parts.path.rstrip("/")
        self._prefix = path if path.endswith("/v1") else path + "/v1"
        self._timeout_s = timeout_s
        self._keeps_connections = keeps_connections
        self._kept: list[_Connection] = []
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Accept: text/event-stream"]
        if not keeps_connections:
            lines.append("Connection: close")
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join([*lines, "Content-Type: application/json"])

    async def get(self, path: str) -> Any:
        """A JSON answer. Raises OSError when the server cannot be reached and ValueError for any other answer."""
        status, _, pieces = await self._exchange(
            f"GET {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\n\r\n".encode()
        )
        body = b"".join(data for _, data in pieces)
        if status != 200:
            raise ValueError(f"GET {self._prefix}{path}: status {status}: {body[:300]!r}")
        return json.loads(body)

    def close(self) -> None:
        """End the connections that were kept."""
        while self._kept:
            self._kept.pop().close()

    async def stream(self, path: str, body: bytes) -> Outcome:
        """Send a streaming request and follow its answer to the end. Never raises for what the server does."""
        outcome, pieces = await self._post(path, body)
        if outcome.error is None:
            _interpret(outcome, pieces)
        return outcome

    async def ask(self, path: str, body: bytes) -> Outcome:
        """Send a request for a whole answer; only its status and times are looked at. Never raises either."""
        outcome, pieces = await self._post(path, body)
        if outcome.error is None and outcome.status != 200:
            outcome.error = f"status {outcome.status}: {_message(b''.join(data for _, data in pieces))}"
        return outcome

    async def _post(self, path: str, body: bytes) -> tuple[Outcome, list[tuple[float, bytes]]]:
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\nContent-Length: {len(body)}\r\n\r\n"
        outcome = Outcome(time.perf_counter())
        pieces: list[tuple[float, bytes]] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome.status, outcome.retry_after_s, pieces = await self._exchange(head.encode() + body)
        except TimeoutError:
            outcome.error = f"no end within {self._timeout_s:g} s"
        except (OSError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.ended_at = time.perf_counter()
        return outcome, pieces

    async def _exchange(self, request: bytes) -> tuple[int, float | None, list[tuple[float, bytes]]]:
        head, pieces = await self._converse(request)
        status = int(head.split(b" ", 2)[1])
        wait = RETRY_AFTER.search(head)
        return status, None if wait is None else int(wait[1]) / 1000, pieces

    async def _converse(self, request: bytes) -> tuple[bytes, list[tuple[float, bytes]]]:
        while self._kept:
            connection = self._kept.pop()
            if connection.is_lost:
                continue
            try:
                return await self._over(connection, request)
            except OSError:
                # The server gave it up while nothing went over it, and did not read this request.
                if connection.has_answered:
                    raise
        _, connection = await asyncio.get_running_loop().create_connection(
            _Connection, self._host, self._port, ssl=self._ssl
        )
        return await self._over(connection, request)

    async def _over(self, connection: _Connection, request: bytes) -> tuple[bytes, list[tuple[float, bytes]]]:
        try:
            answer = await connection.exchange(request)
        except BaseException:
            connection.close()
            raise
        if self._keeps_connections and connection.may_be_kept:
            self._kept.append(connection)
        else:
            connection.close()
        return answer


def _is_complete(pieces: list[tuple[float, bytes]]) -> bool:
    """Whether a chunked body has its last chunk, which is empty."""
    data = b"".join(data for _, data in pieces)
    at = 0
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end].split(b";")[0] or b"0", 16)
        if size == 0:
            return True
        at = line_end + 2 + size + 2
    return False


def _dechunk(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The body inside HTTP's chunked framing, each part with the time at which it was complete."""
    rest = bytearray()
    for at, data in pieces:
        rest += data
        while (line_end := rest.find(b"\r\n")) >= 0:
            size = int(rest[:line_end].split(b";")[0] or b"0", 16)
            end = line_end + 2 + size
            if len(rest) < end + 2:
                break
            if size:
                yield at, bytes(rest[line_end + 2 : end])
            del rest[: end + 2]


def _interpret(outcome: Outcome, pieces: list[tuple[float, bytes]]) -> None:
    if outcome.status != 200:
        body = b"".join(data for _, data in pieces)
        outcome.error = f"status {outcome.status}: {_message(body)}"
        return
    done, last_text_at = False, None
    texts: list[str] = []
    for at, data in _events(pieces):
        if data == b"[DONE]":
            done = True
            continue
        event: Mapping[str, Any] = json.loads(data)
        if "error" in event:
            outcome.error = _message(data)
            return
        _take_usage(outcome, event.get("usage"))
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text:
                texts.append(text)
                if last_text_at is None:
                    outcome.first_at = at
                else:
                    outcome.gaps_s.append(at - last_text_at)
                last_text_at = at
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
    outcome.last_at, outcome.text = last_text_at, "".join(texts)
    if outcome.output_tokens is None:
        outcome.output_tokens = len(texts)
    if outcome.finish_reason is None or not done:
        outcome.error = "the stream ended without finish_reason and [DONE]"


def _events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    rest = b""
    for at, data in pieces:
        *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield at, line[5:].strip()


def _take_usage(outcome: Outcome, usage: Mapping[str, Any] | None) -> None:
    if not usage:
        return
    outcome.prompt_tokens = usage.get("prompt_tokens")
    outcome.output_tokens = usage.get("completion_tokens")
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _message(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return body[:300].decode("utf-8", errors="replace")
