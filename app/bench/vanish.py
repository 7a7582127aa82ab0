"""Clients that vanish at random: is everything returned that their requests held, and is the ledger what was produced?

A service of its own (Redis, gateway, one prefill and one decode worker, the real model) gets streaming requests of a
tenant with every kind of limit. Most clients close their connection at a random instant: before the first byte, while
they wait, in the middle of the answer. When all are gone, every book is held against every other.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.bench.served import ServedError
from app.bench.stack import Stack
from app.bench.workload import TOKEN_RANGE
from app.models.entry import ModelEntry
from memory_pool.client import DEFAULT_LEASE_S
from memory_pool.connection import Connection
from memory_pool.keeper import Keeper
from memory_pool.redis_server import start_redis
from memory_pool.redis_store import LEASE_PREFIX
from memory_pool.reservations import outstanding

_POOL_BYTES = 2 << 30
_SETTLE_S = DEFAULT_LEASE_S + 15.0
"""How long everything may take to be returned after the last client is gone: a lease on blocks that were handed over to
nobody lapses by itself."""
_TENANT = "vanishing"
_GATEWAY_GAUGES = (
    "cloudmatrix_requests_in_flight",
    "cloudmatrix_requests_queued",
    "cloudmatrix_choices_parked",
    "cloudmatrix_sequences_released",
    "cloudmatrix_prompt_tokens_released",
)
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class VanishOptions:
    """`streams` requests, `concurrency` at a time, of at most `max_tokens` tokens each."""

    entry: ModelEntry
    streams: int = 500
    concurrency: int = 64
    max_tokens: int = 48
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Visit:
    """One client: what it asks, and when it leaves. Both None: it stays to the end."""

    prompt: list[int]
    n: int
    leaves_after_s: float | None
    leaves_after_events: int | None


@dataclass(frozen=True)
class Check:
    """One thing that must be so when nobody is left."""

    what: str
    expected: int
    found: int

    @property
    def holds(self) -> bool:
        """Whether it is so."""
        return self.expected == self.found


def make_visits(options: VanishOptions) -> list[Visit]:
    """A fifth stay, two fifths leave at a random instant, two fifths after a random event. Some prompts share heads."""
    draw = random.Random(options.seed)  # noqa: S311 - filler text and chance, not secrets
    heads = [[draw.randrange(*TOKEN_RANGE) for _ in range(64)] for _ in range(8)]
    visits = []
    for number in range(options.streams):
        prompt = draw.choice(heads) + [draw.randrange(*TOKEN_RANGE) for _ in range(draw.randrange(8, 128))]
        after_s = after_events = None
        if number % 5 in (1, 2):
            after_s = draw.uniform(0.0, 4.0)
        elif number % 5 in (3, 4):
            after_events = draw.randrange(0, options.max_tokens)
        visits.append(Visit(prompt, 2 if number % 10 == 4 else 1, after_s, after_events))
    draw.shuffle(visits)
    return visits


def run_vanish(options: VanishOptions, say: Say) -> dict[str, Any]:
    """The outcome of `bench vanish`. Raises ServedError when a part of the service fails."""
    with tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-") as name, contextlib.ExitStack() as held:
        server = start_redis(Path(name, "redis"), maxmemory_bytes=_POOL_BYTES)
        held.callback(server.stop)
        # An hour for a minute: no charge may lapse before it is looked at.
        settings = {"CLOUDMATRIX_LIMIT_WINDOW_S": "3600"}
        stack = Stack(
            Path(name, "stack"), server.url, options.entry, threads=options.threads, settings=settings
        )
        held.enter_context(stack)
        say("a prefill and a decode worker start")
        stack.add_worker("prefill")
        stack.add_worker("decode")
        stack.wait_ready()
        key = _new_tenant(stack.url, options.entry.id)
        client = held.enter_context(
            httpx.Client(base_url=stack.url, headers=_bearer(key), trust_env=False, timeout=30)
        )
        say(f"{options.streams} streams, {options.concurrency} at a time")
        began = time.monotonic()
        ends = asyncio.run(_visit_all(stack.url, key, options))
        seconds = time.monotonic() - began
        say("everybody is gone; waiting for everything to come back")
        began = time.monotonic()
        audit = held.enter_context(contextlib.closing(_Audit(client, server.url)))
        while True:
            checks = audit.checks()
            settled_s = time.monotonic() - began
            if all(check.holds for check in checks) or settled_s > _SETTLE_S:
                break
            time.sleep(0.2)
    return {
        "streams": options.streams,
        "concurrency": options.concurrency,
        "seconds": seconds,
        "ends": dict(sorted(ends.items())),
        "settled_s": settled_s,
        "lapsed_leases": audit.num_lapsed,
        "checks": [
            {"what": c.what, "expected": c.expected, "found": c.found, "holds": c.holds} for c in checks
        ],
        "ok": all(check.holds for check in checks),
    }


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _new_tenant(url: str, model: str) -> str:
    """A tenant that has every kind of limit, none of which is reached, and a price; its key."""
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:

        def post(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
            answer = client.post(f"/api/admin/{path}", json=body)
            if answer.is_error:
                raise ServedError(f"POST /api/admin/{path}: {answer.status_code} {answer.text}")
            made: dict[str, Any] = answer.json()
            return made

        post("tenants", {"id": _TENANT})
        post(f"prices/{model}", {"input": "1", "cached_input": "0.5", "output": "3"})
        limit = {
            "subject_kind": "tenant",
            "subject_id": _TENANT,
            "requests_per_minute": 10**9,
            "tokens_per_minute": 10**9,
            "concurrent_requests": 10**6,
            "monthly_budget": "100000",
        }
        post("limits", limit)
        return str(post("keys", {"tenant_id": _TENANT, "name": "bench", "is_admin": True})["key"])


async def _visit_all(url: str, key: str, options: VanishOptions) -> Counter[str]:
    """How the visits ended, from the clients' side."""
    room = asyncio.Semaphore(options.concurrency)
    limits = httpx.Limits(max_connections=options.concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, headers=_bearer(key), trust_env=False, timeout=120, limits=limits
    ) as client:

        async def visit(one: Visit) -> str:
            async with room:
                try:
                    async with asyncio.timeout(one.leaves_after_s):
                        return await _stream(client, options, one)
                except TimeoutError:
                    return "left at an instant"

        return Counter(await asyncio.gather(*map(visit, make_visits(options))))


async def _stream(client: httpx.AsyncClient, options: VanishOptions, visit: Visit) -> str:
    body = {
        "model": options.entry.id,
        "prompt": visit.prompt,
        "n": visit.n,
        "max_tokens": options.max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != httpx.codes.OK:
            return f"refused with {answer.status_code}"
        number = 0
        async for line in answer.aiter_lines():
            number += line.startswith("data: {")
            if line == "data: [DONE]":
                return "stayed to the end"
            if visit.leaves_after_events is not None and number >= visit.leaves_after_events:
                return "left within the answer" if number else "left before the answer"
    return "was cut off"


class _Audit:
    """Holds the books of gateway, workers, pool and database against each other."""

    def __init__(self, client: httpx.Client, redis_url: str) -> None:
        self._client = client
        self._connection = Connection(redis_url)
        self._keeper = Keeper(redis_url)
        self.num_lapsed = 0
        """Leases on blocks that ran out because nobody released them."""

    def checks(self) -> list[Check]:
        """Everything that must be so when all clients are gone."""
        return [*self._gateway(), *self._workers(), *self._pool(), *self._ledger()]

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()
        self._keeper.close()

    def _gateway(self) -> Iterable[Check]:
        totals = _totals(self._client.get("/metrics").text)
        for name in _GATEWAY_GAUGES:
            yield Check(f"gateway {name.removeprefix('cloudmatrix_')}", 0, round(totals[name]))

    def _workers(self) -> Iterable[Check]:
        for worker in self._client.get("/api/workers").json()["workers"]:
            state = self._client.get(f"{worker['url']}/state").json()
            for name in ("running", "waiting", "queued_tokens", "kv_blocks_used"):
                yield Check(f"{worker['id']} {name}", 0, state[name])
            yield Check(f"{worker['id']} in_flight on the gateway's link", 0, worker["in_flight"])

    def _pool(self) -> Iterable[Check]:
        integrity = self._keeper.audit()
        self.num_lapsed += integrity.expired_leases
        for name in ("uncharged_bytes", "vanished", "wrong_size", "dead_writers"):
            yield Check(f"pool books {name}", 0, getattr(integrity, name))
        yield Check("pool leases on blocks", 0, len(self._connection.scan(f"{LEASE_PREFIX}*")))

    def _ledger(self) -> Iterable[Check]:
        rows = self._client.get("/api/admin/usage", params={"tenant": _TENANT}).json()["usage"]
        used = rows[0]
        produced = 0
        for worker in self._client.get("/api/workers").json()["workers"]:
            totals = _totals(self._client.get(f"{worker['url']}/metrics").text)
            produced += round(totals["vllm:generation_tokens_total"])
        counters = outstanding(self._connection, "cm:q:")
        yield Check(
            "ledger completion_tokens = tokens that workers made", produced, used["completion_tokens"]
        )
        yield Check("limits: requests under way", 0, counters.leases)
        yield Check("limits: costs reserved", 0, counters.budget_holds)
        tokens = used["prompt_tokens"] + used["completion_tokens"]
        for name, amount in counters.windows.items():
            kept = used["requests"] if name.endswith(":requests") else tokens
            yield Check(f"limits: {name.rpartition(':')[2]} charged = ledger", kept, amount)
        for spent in counters.spent.values():
            yield Check("limits: budget spent (10^-9) = ledger", round(float(used["cost"]) * 1e9), spent)


def _totals(exposition: str) -> dict[str, float]:
    """The sum of each metric's samples over their labels; 0 for those without any."""
    totals: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            totals[sample.name] += sample.value
    return totals
