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

READ_BYTES = 65536
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


class StreamingClient:
    """Posts JSON to one server, a connection a request."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_s: float) -> None:
        parts = urlsplit(base_url if "://" in base_url else "http://" + base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url {base_url!r}: expected something like http://127.0.0.1:8000")
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        path = parts.path.rstrip("/")
        self._prefix = path if path.endswith("/v1") else path + "/v1"
        self._timeout_s = timeout_s
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Connection: close", "Accept: text/event-stream"]
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
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.ended_at = time.perf_counter()
        return outcome, pieces

    async def _exchange(self, request: bytes) -> tuple[int, float | None, list[tuple[float, bytes]]]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._ssl, limit=2**20)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            pieces: list[tuple[float, bytes]] = []
            while data := await reader.read(READ_BYTES):
                pieces.append((time.perf_counter(), data))
        finally:
            writer.close()
        status = int(head.split(b" ", 2)[1])
        wait = RETRY_AFTER.search(head)
        retry_after_s = None if wait is None else int(wait[1]) / 1000
        chunked = b"transfer-encoding: chunked" in head.lower()
        return status, retry_after_s, list(_dechunk(pieces)) if chunked else pieces


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
