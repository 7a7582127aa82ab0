"""What handing over costs: the first tokens of a request that one worker serves alone, beside prefill and decode apart.

Two services stand side by side: one with a single worker of role `both`, one with a prefill and a decode worker. Each
prompt, never seen before, goes to both, now to one first, now to the other; the answers must be equal. The prefill
worker emits the first token, so TTFT shows what publishing costs there; what the decode worker adds (being told,
fetching the KV) shows in the time to the second token.
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

from app.bench.client import Outcome, StreamingClient
from app.bench.served import ServedError
from app.bench.stack import Stack
from app.bench.workload import TOKEN_RANGE
from app.models.entry import ModelEntry
from memory_pool.redis_server import start_redis

MAX_TOKENS = 8
_POOL_BYTES = 2 << 30
_SETTLE_S = 0.1
"""Between two requests, for what the one before left behind: its blocks on their way to the pool."""
_WARM_UP = 3
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HandoffOptions:
    """What to measure: `repeat` prompts of `length` tokens, each sent to both services."""

    entry: ModelEntry
    length: int = 1024
    repeat: int = 21
    threads: int = 2


@dataclass(slots=True)
class _Side:
    """Seconds of each request, in order; of those a record has, the phases of the decode worker."""

    ttft_s: list[float] = field(default_factory=list)
    second_s: list[float | None] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)


def measure_handoff(options: HandoffOptions, say: Say) -> dict[str, Any]:
    """The table of `bench handoff`. Raises ServedError when a part fails or two answers differ."""
    draw = random.Random(2)  # noqa: S311 - filler text, not secrets
    with tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-") as name, contextlib.ExitStack() as held:
        folder = Path(name)
        stacks: list[Stack] = []
        for which in ("together", "apart"):
            server = start_redis(folder / which / "redis", maxmemory_bytes=_POOL_BYTES)
            held.callback(server.stop)
            stack = Stack(folder / which, server.url, options.entry, threads=options.threads)
            stacks.append(held.enter_context(stack))
        together, apart = stacks
        say("workers start: one of role both; one prefill, one decode")
        together.add_worker("both")
        apart.add_worker("prefill")
        apart.add_worker("decode")
        together.wait_ready()
        apart.wait_ready()
        sides = {"together": _Side(), "apart": _Side()}
        for turn in range(-_WARM_UP, options.repeat):
            prompt = [draw.randrange(*TOKEN_RANGE) for _ in range(options.length)]
            order = [("together", together), ("apart", apart)]
            texts = set()
            for which, stack in order if turn % 2 else reversed(order):
                outcome = _ask(stack.url, options.entry.id, prompt)
                texts.add(outcome.text)
                record = stack.newest_record()
                time.sleep(_SETTLE_S)
                if turn >= 0:
                    _add(sides[which], outcome, record)
            if len(texts) != 1:
                raise ServedError(f"prompt {turn}: the two services answered differently")
            if turn >= 0 and not (turn + 1) % 7:
                say(f"{turn + 1} of {options.repeat} prompts")
    return _summary(options, sides)


def _ask(url: str, model: str, prompt: Sequence[int]) -> Outcome:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    client = StreamingClient(url, api_key=None, timeout_s=60)
    outcome = asyncio.run(client.stream("/completions", json.dumps(body).encode()))
    if outcome.error is not None:
        raise ServedError(f"a request failed: {outcome.error}")
    return outcome


def _add(side: _Side, outcome: Outcome, record: dict[str, Any]) -> None:
    side.ttft_s.append(outcome.e2e_s if outcome.ttft_s is None else outcome.ttft_s)
    # A token without a text of its own (half a character) comes with the next one: then nothing is known.
    second = outcome.gaps_s[0] if len(outcome.gaps_s) == MAX_TOKENS - 1 else None
    side.second_s.append(None if second is None else side.ttft_s[-1] + second)
    side.tpot_s += outcome.gaps_s[1:]
    for phase in record["timeline"]:
        if phase["where"] != "gateway":
            name = f"{phase['where']} {phase['phase']}"
            side.phases.setdefault(name, []).append(phase["duration_s"])


def _summary(options: HandoffOptions, sides: dict[str, _Side]) -> dict[str, Any]:
    together, apart = sides["together"], sides["apart"]
    seconds = [
        (a, b)
        for a, b in zip(apart.second_s, together.second_s, strict=True)
        if a is not None and b is not None
    ]
    return {
        "prompt_tokens": options.length,
        "requests": options.repeat,
        "threads": options.threads,
        "rows": {
            which: {
                "ttft_s": statistics.median(side.ttft_s),
                "second_token_s": _median([each for each in side.second_s if each is not None]),
                "tpot_s": _median(side.tpot_s),
                "phases_s": {name: statistics.median(values) for name, values in side.phases.items()},
            }
            for which, side in sides.items()
        },
        "ttft_overhead": statistics.median(
            a / b - 1 for a, b in zip(apart.ttft_s, together.ttft_s, strict=True)
        ),
        "second_token_overhead": _median([a / b - 1 for a, b in seconds]),
        "answers_equal": options.repeat,
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
