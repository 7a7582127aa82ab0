"""What long prompts do to running answers: TPOT while a 2,000-token prompt arrives each second, against TPOT without.

Phases with and without long prompts take turns on one service. A phase is a number of streams that all run from its
beginning to its end; in a disturbed one the first long prompt is sent before the streams are, and the last before
they end, so that no token of any stream is decoded undisturbed.
"""

import asyncio
import contextlib
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.bench import served
from app.bench.client import Outcome, StreamingClient
from app.bench.load import percentiles
from app.bench.workload import TOKEN_RANGE

LIMIT = 1.5
"""Disturbed over undisturbed TPOT p99 that is still good."""
PROMPT_TOKENS = 64
_HEAD_START_S = 0.05


@dataclass(frozen=True, kw_only=True)
class InterferenceOptions:
    """What to run: `num_streams` answers of `output_tokens` beside prompts of `long_tokens`, one each `every_s`.

    `more` are further flags of `cloudmatrix up`, e.g. to run one worker of role both.
    """

    model: str
    threads: int = 2
    num_streams: int = 8
    output_tokens: int = 384
    long_tokens: int = 2000
    every_s: float = 1.0
    repeat: int = 5
    more: Sequence[str] = ()


def run_interference(options: InterferenceOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure on a service of its own. Raises ServedError when it does not come up or a request fails."""
    with served.service(model=options.model, threads=options.threads, more=options.more) as url:
        return asyncio.run(_alternate(url, options, say))


async def _alternate(url: str, options: InterferenceOptions, say: Callable[[str], None]) -> dict[str, Any]:
    client = StreamingClient(url, api_key=None, timeout_s=served.START_TIMEOUT_S)
    draw = random.Random(0)  # noqa: S311 - filler text, not secrets
    await _phase(client, options, draw, disturbed=True)  # warms up
    rows: list[dict[str, Any]] = []
    for number in range(options.repeat):
        alone = _figures(*await _phase(client, options, draw, disturbed=False))
        beside = _figures(*await _phase(client, options, draw, disturbed=True))
        ratio = beside["tpot_p99_s"] / alone["tpot_p99_s"]
        rows.append({"alone": alone, "disturbed": beside, "ratio": ratio})
        say(f"{number + 1} of {options.repeat}: TPOT p99 {ratio:.2f} x")
    return {
        "streams": options.num_streams,
        "output_tokens": options.output_tokens,
        "long_tokens": options.long_tokens,
        "every_s": options.every_s,
        "repeat": options.repeat,
        "alone": _medians([row["alone"] for row in rows]),
        "disturbed": _medians([row["disturbed"] for row in rows]),
        "ratio": statistics.median(row["ratio"] for row in rows),
        "limit": LIMIT,
        "runs": rows,
    }


async def _phase(
    client: StreamingClient, options: InterferenceOptions, draw: random.Random, *, disturbed: bool
) -> tuple[list[Outcome], list[Outcome]]:
    """The streams of one phase and the long prompts beside them, all ended."""
    long: list[asyncio.Task[Outcome]] = []

    async def arrive() -> None:
        while True:
            long.append(asyncio.create_task(_send(client, options.model, draw, options.long_tokens, 1)))
            await asyncio.sleep(options.every_s)

    arriving = asyncio.create_task(arrive()) if disturbed else None
    await asyncio.sleep(_HEAD_START_S)
    streams = await asyncio.gather(
        *(
            _send(client, options.model, draw, PROMPT_TOKENS, options.output_tokens)
            for _ in range(options.num_streams)
        )
    )
    if arriving is not None:
        arriving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await arriving
    ended = await asyncio.gather(*long)
    for outcome in [*streams, *ended]:
        if outcome.error is not None:
            raise served.ServedError(f"a request failed: {outcome.error}")
    return streams, ended


async def _send(
    client: StreamingClient, model: str, draw: random.Random, prompt_tokens: int, output_tokens: int
) -> Outcome:
    body = {
        "model": model,
        "prompt": draw.choices(range(*TOKEN_RANGE), k=prompt_tokens),
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return await client.stream("/completions", json.dumps(body).encode())


def _figures(streams: Sequence[Outcome], long: Sequence[Outcome]) -> dict[str, Any]:
    tpot = percentiles([outcome.tpot_s for outcome in streams if outcome.tpot_s is not None])
    return {
        "tpot_p50_s": tpot["p50"],
        "tpot_p99_s": tpot["p99"],
        "itl_p99_s": percentiles([gap for outcome in streams for gap in outcome.gaps_s])["p99"],
        "long_ttft_p50_s": percentiles([o.ttft_s for o in long if o.ttft_s is not None])["p50"],
        "long_prompts": float(len(long)) or None,
    }


def _medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: None if rows[0][name] is None else statistics.median(row[name] for row in rows)
        for name in rows[0]
    }
