"""Faults of the memory pool under load: is every answer the same as without the fault, and what does it cost?

One service (`cloudmatrix up`: gateway, prefill, decode, Redis, keeper, disk tier) answers a list of requests again and
again: without a fault, then with one after the other. A fault begins when a quarter of the answers are there. Its
answers must have the tokens and log-probabilities of the first run, bit by bit, and the fault must have left a trace:
one that nobody noticed shows nothing.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from app.bench import served
from app.bench.fault_kinds import FAULTS, Fault, Injury
from app.bench.workload import TOKEN_RANGE
from app.models.entry import ModelEntry

BLOCK_TOKENS = 32
HEADS, HEAD_BLOCKS = 12, 8
KV_MEMORY_MIB = 32
"""Of each worker: less than the requests need together, so that they keep coming back to the pool."""
_TIMEOUT_S = 120.0
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FaultsOptions:
    """What to run: `requests` of each run, `concurrency` at a time. `redis_url` None: a Redis of the service's own."""

    entry: ModelEntry
    requests: int = 48
    concurrency: int = 6
    output_tokens: int = 24
    faults: Sequence[Fault] = tuple(FAULTS.values())
    threads: int = 2
    redis_url: str | None = None


@dataclass(slots=True)
class _Run:
    """What the clients saw. `answers`: tokens and log-probabilities by request; None: it failed."""

    answers: list[Any]
    errors: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0


def measure_faults(options: FaultsOptions, say: Say) -> dict[str, Any]:
    """The rows of `bench faults`, of which the first is without a fault.

    Raises ServedError when the service does not come up, when two runs without a fault differ or a fault leaves no
    trace.
    """
    bodies = _bodies(options)
    with tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-") as name:
        folder = Path(name)
        more: tuple[str, ...] = (
            "--kv-memory-mib",
            str(KV_MEMORY_MIB),
            "--pool-memory-mib",
            "512",
            "--pool-disk-mib",
            "2048",
        )
        if options.redis_url:
            more += ("--redis", options.redis_url)
        with served.running(folder, model=options.entry.id, threads=options.threads, more=more) as url:
            reference = _load(options, url, bodies, None)
            calm = _load(options, url, bodies, None)
            for run in (reference, calm):
                if run.errors or run.answers != reference.answers:
                    raise served.ServedError(f"answers differ without any fault: {run.errors[:3]}")
            say(f"without a fault: {len(bodies)} answers, p50 {_p50(calm) * 1e3:.0f} ms")
            rows = [_row("none", reference, calm, calm, "–")]
            for fault in options.faults:
                with Injury(url, folder, options.redis_url) as injury:
                    run = _load(options, url, bodies, partial(fault.strike, injury))
                    trace = fault.trace(injury)
                injury.wait_healed()
                calm = _load(options, url, bodies, None)
                row = _row(fault.name, reference, run, calm, trace)
                rows.append(row)
                say(f"{fault.name}: wrong {row['wrong']}, failed {row['failed']}, {trace}")
    return {"requests": options.requests, "concurrency": options.concurrency, "rows": rows}


def _bodies(options: FaultsOptions) -> list[dict[str, Any]]:
    """Prompts of which many share a head; half of them greedy, half drawn with a seed."""
    draw = random.Random(3)  # noqa: S311 - filler text, not secrets
    heads = [[draw.randrange(*TOKEN_RANGE) for _ in range(HEAD_BLOCKS * BLOCK_TOKENS)] for _ in range(HEADS)]
    return [
        {
            "model": options.entry.id,
            "prompt": heads[number % HEADS] + [draw.randrange(*TOKEN_RANGE) for _ in range(40)],
            "max_tokens": options.output_tokens,
            "ignore_eos": True,
            "logprobs": 1,
            **({"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}),
        }
        for number in range(options.requests)
    ]


def _load(
    options: FaultsOptions, url: str, bodies: Sequence[dict[str, Any]], strike: Callable[[], None] | None
) -> _Run:
    """All requests in a closed loop; `strike` is called in a thread of its own when a quarter of them are answered."""
    run = _Run([None] * len(bodies))
    struck: list[asyncio.Future[None]] = []

    async def go() -> None:
        waiting = iter(enumerate(bodies))
        async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            await asyncio.gather(*(user(client, waiting) for _ in range(options.concurrency)))
        await asyncio.gather(*struck)

    async def user(client: httpx.AsyncClient, waiting: Any) -> None:
        for number, body in waiting:
            if strike is not None and not struck and len(run.latencies_s) >= len(bodies) // 4:
                struck.append(asyncio.ensure_future(asyncio.to_thread(strike)))
            began = time.monotonic()
            try:
                answer = await client.post("/v1/completions", content=json.dumps(body))
                if answer.status_code != httpx.codes.OK:
                    raise served.ServedError(f"status {answer.status_code}: {answer.text[:200]}")
                whole = answer.json()
            except (httpx.HTTPError, ValueError, served.ServedError) as error:
                run.errors.append(f"{type(error).__name__}: {error}")
                continue
            run.latencies_s.append(time.monotonic() - began)
            choice = whole["choices"][0]
            run.answers[number] = (choice["text"], choice["logprobs"]["token_logprobs"])
            run.cached_tokens += whole["usage"]["prompt_tokens_details"]["cached_tokens"]

    asyncio.run(go())
    return run


def _row(name: str, reference: _Run, run: _Run, calm: _Run, trace: str) -> dict[str, Any]:
    wrong = sum(
        answer is not None and answer != expected
        for answer, expected in zip(run.answers, reference.answers, strict=True)
    )
    return {
        "fault": name,
        "requests": len(run.answers),
        "wrong": wrong,
        "failed": len(run.errors),
        "errors": run.errors[:3],
        "cached_tokens": run.cached_tokens,
        "p50_s": _p50(run),
        "slowdown": _p50(run) / _p50(calm),
        "slowest_s": max(run.latencies_s),
        "trace": trace,
    }


def _p50(run: _Run) -> float:
    return statistics.median(run.latencies_s)
