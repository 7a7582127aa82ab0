"""Drives a running service over HTTP and notes what a client sees; prompts are token ids, so reuse is known
exactly.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from app.twin.errors import TwinError
from app.twin.neighbours import Neighbours


@dataclass(frozen=True, slots=True)
class Call:
    """A request to send: when, counted from the start of the run, which prompt, how many tokens at most."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of a call. `token_at_s`: instants of the chunks after sending, on the client's clock.

    `neighbour_cores`: cores of this machine that other programs kept busy meanwhile; None when that is unknown.
    """

    call: Call
    sent_at_s: float
    token_at_s: tuple[float, ...]
    completion_tokens: int
    record: dict[str, Any]
    neighbour_cores: float | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.token_at_s[0]

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two."""
        if self.completion_tokens < 2:
            return None
        return (self.token_at_s[-1] - self.token_at_s[0]) / (self.completion_tokens - 1)


class Service:
    """A running gateway. Raises `TwinError` with the URL when it cannot be reached or refuses."""

    def __init__(self, base_url: str, model: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object of the gateway."""
        try:
            answer = httpx.get(f"{self.base_url}{path}", headers=self._headers, timeout=30)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise TwinError(f"{self.base_url}{path}: {error}") from None
        return found

    def workers(self) -> list[dict[str, Any]]:
        """The workers that serve the model. Raises `TwinError` when there is none."""
        workers = [w for w in self.get("/api/workers")["workers"] if w.get("model") == self.model]
        if not workers:
            raise TwinError(f"model: no worker of {self.base_url} serves {self.model!r}")
        return workers

    def drive(self, calls: Sequence[Call], neighbours: Neighbours | None = None) -> list[Seen]:
        """Send all calls at their instants and wait for all answers."""
        started, seen = asyncio.run(self._drive(calls))
        if neighbours is None:
            return seen
        return [
            replace(s, neighbour_cores=neighbours.share(begun, begun + s.token_at_s[-1]))
            for s in seen
            for begun in (started + s.sent_at_s,)
        ]

    async def _drive(self, calls: Sequence[Call]) -> tuple[float, list[Seen]]:
        limits = httpx.Limits(max_connections=len(calls) + 1)
        async with httpx.AsyncClient(headers=self._headers, timeout=600, limits=limits) as client:
            started = time.perf_counter()
            return started, await asyncio.gather(*(self._one(client, call, started) for call in calls))

    async def _one(self, client: httpx.AsyncClient, call: Call, started: float) -> Seen:
        await asyncio.sleep(max(0.0, started + call.at_s - time.perf_counter()))
        body = {
            "model": self.model,
            "prompt": list(call.prompt),
            "max_tokens": call.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent = time.perf_counter()
        instants: list[float] = []
        tokens = 0
        try:
            async with client.stream("POST", f"{self.base_url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")
                    raise TwinError(f"{self.base_url}/v1/completions: {answer.status_code} {text[:300]}")
                request_id = answer.headers.get("x-request-id", "")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if event.get("choices"):
                        instants.append(time.perf_counter() - sent)
                    if event.get("usage"):
                        tokens = event["usage"]["completion_tokens"]
            record = (await client.get(f"{self.base_url}/api/requests/{request_id}")).json()
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise TwinError(f"{self.base_url}: {error!r}") from None
        if not instants:
            raise TwinError(f"{self.base_url}/v1/completions: request {request_id} ended without a token")
        return Seen(call, sent - started, tuple(instants), tokens, record)
