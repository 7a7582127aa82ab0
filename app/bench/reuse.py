"""TTFT against reuse: how much sooner the first token comes when a worker that is gone computed the prompt's head.

Worker A computes the heads of all prompts and is killed with SIGKILL; worker B, which never saw them, is sent the whole
prompts over HTTP. Beside it stands worker N, the same but without a pool; at 0 % reuse B and N take turns, so that
what the pool costs when it cannot help is measured on the same machine at the same time.
"""

import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.bench.client import StreamingClient
from app.bench.served import ServedError
from app.bench.stack import Stack
from app.bench.workload import TOKEN_RANGE
from app.models.entry import ModelEntry
from memory_pool.redis_server import start_redis

BLOCK_TOKENS = 32
SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 0.9)
_POOL_BYTES = 4 << 30
_SETTLE_S = 0.03
"""Between two requests, for what the one before left behind."""
_WARM_UP = 4
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReuseOptions:
    """What to measure: medians of `repeat` prompts for each length and share, of three times as many pairs at 0 %."""

    entry: ModelEntry
    lengths: Sequence[int] = (1024, 2048)
    shares: Sequence[float] = SHARES
    repeat: int = 7
    threads: int = 2


@dataclass(slots=True)
class _Samples:
    ttft_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)

    def add(self, ttft_s: float, record: dict[str, Any]) -> None:
        self.ttft_s.append(ttft_s)
        self.cached_tokens.append(record["usage"]["cached_tokens"] or 0)
        for phase in record["timeline"]:
            if phase["where"] != "gateway":
                self.phases.setdefault(phase["phase"], []).append(phase["duration_s"])


def measure_reuse(options: ReuseOptions, say: Say) -> dict[str, Any]:
    """The table of `bench reuse`. Raises ServedError when a part of the service fails."""
    draw = random.Random(1)  # noqa: S311 - filler text, not secrets
    prompts = {
        (length, share, number): [draw.randrange(*TOKEN_RANGE) for _ in range(length)]
        for length in options.lengths
        for share in options.shares
        for number in range(options.repeat if share else 6 * options.repeat)
    }
    with tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-") as name, contextlib.ExitStack() as held:
        folder = Path(name)
        stacks = []
        for which in ("pool", "alone"):
            server = start_redis(folder / which / "redis", maxmemory_bytes=_POOL_BYTES)
            held.callback(server.stop)
            stack = Stack(folder / which, server.url, options.entry, threads=options.threads)
            stacks.append(held.enter_context(stack))
        with_pool, alone = stacks
        first = with_pool.add_worker("both", 0)
        with_pool.wait_ready()
        heads = [
            prompt[: reused_tokens(length, share)]
            for (length, share, _), prompt in prompts.items()
            if reused_tokens(length, share)
        ]
        say(f"worker A computes the heads of {len(heads)} prompts")
        for head in heads:
            send(with_pool.url, options.entry.id, head, max_tokens=1)
        with_pool.newest_record()  # waits for the worker's report: all is in the pool
        with_pool.kill_worker(first)
        say("worker A is killed; workers B and N start")
        with_pool.add_worker("both", 1)
        alone.add_worker("both", 1, "--no-pool")
        with_pool.wait_ready()
        alone.wait_ready()
        for stack in stacks * _WARM_UP:
            _first_token(stack, options.entry.id, [draw.randrange(*TOKEN_RANGE) for _ in range(1024)])
        found = _measure(options, with_pool, alone, prompts, say)
    return {"block_tokens": BLOCK_TOKENS, "repeat": options.repeat, "rows": list(_rows(options, found))}


def reused_tokens(length: int, share: float) -> int:
    """The whole blocks nearest to a share of a prompt, in tokens."""
    return round(share * length / BLOCK_TOKENS) * BLOCK_TOKENS


def send(url: str, model: str, prompt: Sequence[int], *, max_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first text of a greedy completion of token ids, and the gaps after it. Raises ServedError."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    client = StreamingClient(url, api_key=None, timeout_s=60)
    outcome = asyncio.run(client.stream("/completions", json.dumps(body).encode()))
    if outcome.error is not None:
        raise ServedError(f"a request failed: {outcome.error}")
    # An answer without any text (half a character) has its one event at the end.
    ttft_s = outcome.e2e_s if outcome.ttft_s is None else outcome.ttft_s
    return ttft_s, outcome.gaps_s


def _first_token(stack: Stack, model: str, prompt: Sequence[int]) -> tuple[float, dict[str, Any]]:
    ttft_s, _ = send(stack.url, model, prompt, max_tokens=1)
    record = stack.newest_record()
    time.sleep(_SETTLE_S)
    return ttft_s, record


def _measure(
    options: ReuseOptions,
    with_pool: Stack,
    alone: Stack,
    prompts: dict[tuple[int, float, int], list[int]],
    say: Say,
) -> dict[tuple[int, float, bool], _Samples]:
    found: dict[tuple[int, float, bool], _Samples] = {}

    def ask(stack: Stack, length: int, share: float, number: int) -> None:
        ttft_s, record = _first_token(stack, options.entry.id, prompts[length, share, number])
        found.setdefault((length, share, stack is alone), _Samples()).add(ttft_s, record)

    for turn in range(options.repeat):
        for length in options.lengths:
            for pair in range(turn * 3, turn * 3 + 3):
                # Now one first, now the other.
                order = (with_pool, alone) if pair % 2 else (alone, with_pool)
                for offset, stack in enumerate(order):
                    ask(stack, length, 0.0, 2 * pair + offset)
            for share in options.shares:
                if share:
                    ask(with_pool, length, share, turn)
        say(f"turn {turn + 1} of {options.repeat}")
    return found


def _rows(options: ReuseOptions, found: dict[tuple[int, float, bool], _Samples]) -> Sequence[dict[str, Any]]:
    rows = []
    for length in options.lengths:
        alone = statistics.median(found[length, 0.0, True].ttft_s)
        nothing_reused = statistics.median(found[length, 0.0, False].ttft_s)
        rows.append(_row(length, None, found[length, 0.0, True], None, None))
        for share in options.shares:
            samples = found[length, share, False]
            ttft_s = statistics.median(samples.ttft_s)
            overhead = ttft_s / alone - 1 if not share else None
            rows.append(_row(length, share, samples, 1 - ttft_s / nothing_reused, overhead))
    return rows


def _row(
    length: int, share: float | None, samples: _Samples, saved: float | None, overhead: float | None
) -> dict[str, Any]:
    quartiles = statistics.quantiles(samples.ttft_s, n=4)
    return {
        "prompt_tokens": length,
        "reuse": share,
        "cached_tokens": statistics.median(samples.cached_tokens),
        "requests": len(samples.ttft_s),
        "ttft_s": statistics.median(samples.ttft_s),
        "ttft_s_quartiles": [quartiles[0], quartiles[2]],
        "saved": saved,
        "overhead": overhead,
        "phases_s": {name: statistics.median(values) for name, values in samples.phases.items()},
    }
