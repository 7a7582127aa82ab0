"""Speculation: decoding with guesses from the text so far, against decoding without, on the same prompts in turns.

Two services of one worker each, alike but for `--no-speculation`, answer every prompt one after the other. The answers
must be the same, greedy and with a seed: a guess only saves time.
"""

import asyncio
import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.bench.client import Outcome, StreamingClient
from app.bench.served import START_TIMEOUT_S, ServedError
from app.bench.speculation_prompts import OTHERS, REPEATING
from app.bench.stack import Stack
from app.models.entry import ModelEntry
from memory_pool.redis_server import start_redis

AIM_REPEATING = 1.3
"""Tokens per second with speculation over those without, on prompts whose answers repeat them."""
AIM_OTHERS = 0.97
"""The same on all others: what the guessing may cost."""
_POOL_BYTES = 1 << 30
_WARM_UP = 3
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What to run: each prompt `repeat` times on both sides, for each number of requests at a time."""

    entry: ModelEntry
    concurrency: Sequence[int] = (1, 4)
    output_tokens: int = 160
    repeat: int = 3
    threads: int = 2


@dataclass(frozen=True, slots=True)
class _Case:
    kind: str
    prompts: Sequence[str]
    aim: float
    sampling: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Turn:
    """Tokens after the first ones, and the seconds that the answers took for them, added up."""

    num_tokens: int
    with_s: float
    without_s: float


def measure_speculation(options: SpeculationOptions, say: Say) -> dict[str, Any]:
    """The rows of `bench speculation`. Raises ServedError when a service fails or two answers differ."""
    with tempfile.TemporaryDirectory(prefix="cloudmatrix-bench-") as name, contextlib.ExitStack() as held:
        sides = []
        for which, more in (("with", ()), ("without", ("--no-speculation",))):
            server = start_redis(Path(name) / which / "redis", maxmemory_bytes=_POOL_BYTES)
            held.callback(server.stop)
            side = held.enter_context(
                Stack(Path(name) / which, server.url, options.entry, threads=options.threads)
            )
            side.add_worker("both", 0, *more)
            side.wait_ready()
            sides.append(StreamingClient(side.url, api_key=None, timeout_s=START_TIMEOUT_S))
        cases = _cases()
        for case in cases[:_WARM_UP]:
            _pair(sides, options, case, max(options.concurrency), turn=1)
        rows = []
        for at_once in options.concurrency:
            for case in cases:
                turns = [_turn(sides, options, case, at_once, turn) for turn in range(options.repeat)]
                row = {
                    "kind": case.kind,
                    "sampling": case.sampling,
                    "concurrency": at_once,
                    "output_tokens": turns[0].num_tokens,
                    "tokens_per_s_with": statistics.median(turn.num_tokens / turn.with_s for turn in turns),
                    "tokens_per_s_without": statistics.median(
                        turn.num_tokens / turn.without_s for turn in turns
                    ),
                    "ratio": statistics.median(turn.without_s / turn.with_s for turn in turns),
                    "aim": case.aim,
                }
                rows.append(row)
                say(f"{at_once} at a time, {case.kind}, {case.sampling}: {row['ratio']:.2f} x")
    return {"output_tokens": options.output_tokens, "repeat": options.repeat, "rows": rows}


def _cases() -> list[_Case]:
    groups = [(kind, prompts, AIM_REPEATING) for kind, prompts in REPEATING.items()]
    groups += [(kind, prompts, AIM_OTHERS) for kind, prompts in OTHERS.items()]
    ways = (("greedy", {"temperature": 0}), ("seed", {"temperature": 0.3, "seed": 7}))
    return [_Case(*group, *way) for group in groups for way in ways]


def _turn(
    sides: Sequence[StreamingClient], options: SpeculationOptions, case: _Case, at_once: int, turn: int
) -> _Turn:
    """Every prompt of a case once on both sides, checked to give the same text."""
    num_tokens, seconds = 0, [0.0, 0.0]
    for answers in zip(*_pair(sides, options, case, at_once, turn), strict=True):
        one, other = answers
        if one.text != other.text:
            raise ServedError(f"speculation changed an answer: {one.text!r} is not {other.text!r}")
        num_tokens += (one.output_tokens or 1) - 1
        for side, answer in enumerate(answers):
            if answer.tpot_s is not None:
                seconds[side] += answer.tpot_s * ((answer.output_tokens or 1) - 1)
    if not num_tokens:
        raise ServedError(f"{case.kind}: no answer had two tokens")
    return _Turn(num_tokens, *seconds)


def _pair(
    sides: Sequence[StreamingClient], options: SpeculationOptions, case: _Case, at_once: int, turn: int
) -> tuple[list[Outcome], list[Outcome]]:
    """All prompts of a case on both sides, `at_once` at a time, now one side first and now the other."""
    found: tuple[list[Outcome], list[Outcome]] = ([], [])
    for begin in range(0, len(case.prompts), at_once):
        prompts = case.prompts[begin : begin + at_once]
        order = (0, 1) if (turn + begin // at_once) % 2 else (1, 0)
        for side in order:
            found[side].extend(asyncio.run(_ask(sides[side], options, case, prompts)))
    return found


async def _ask(
    client: StreamingClient, options: SpeculationOptions, case: _Case, prompts: Sequence[str]
) -> list[Outcome]:
    outcomes = await asyncio.gather(
        *(client.stream("/chat/completions", _body(options, case, p)) for p in prompts)
    )
    for outcome in outcomes:
        if outcome.error is not None:
            raise ServedError(f"a request failed: {outcome.error}")
    return outcomes


def _body(options: SpeculationOptions, case: _Case, prompt: str) -> bytes:
    body = {
        "model": options.entry.id,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": options.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **case.parameters,
    }
    return json.dumps(body).encode()
