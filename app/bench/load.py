"""`cloudmatrix bench load`: a load test of any OpenAI-compatible streaming server.

TTFT runs from sending a request to its first text, TPOT is (last text - first text) / (output tokens - 1), end to end
to the last byte. Goodput counts requests that met every objective given; a failed request meets none.
"""

import asyncio
import contextlib
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.bench.client import Outcome, StreamingClient
from app.bench.workload import Call, prompt_calls, read_prompts, read_trace, trace_calls

TPOT_FORMULA = "(last text - first text) / (output tokens - 1)"
Progress = Callable[[int, int], None]
"""Called with the requests that ended and that failed, as they do."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What to send to whom. `rate` (requests a second) and `trace` make an open loop, else it is closed."""

    base_url: str
    model: str
    concurrency: int = 8
    requests: int = 64
    prompts: Path | None = None
    max_tokens: int = 64
    rate: float | None = None
    trace: Path | None = None
    speed: float = 1.0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    api_key: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 600.0
    seed: int = 0


def run_load(options: LoadOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Run the test; the result as `bench load --json` prints it. Raises ValueError for options that cannot be used."""
    return asyncio.run(_run(options, progress or (lambda _ended, _failed: None)))


def run_outcomes(options: LoadOptions) -> list[Outcome]:
    """Run the test; every request as it went. Raises ValueError for options that cannot be used."""

    async def run() -> list[Outcome]:
        with _client(options) as client:
            calls = list(await _calls(options, client))
            return (await _send_all(options, client, calls, lambda _ended, _failed: None))[0]

    return asyncio.run(run())


@contextlib.contextmanager
def _client(options: LoadOptions) -> Iterator[StreamingClient]:
    client = StreamingClient(
        options.base_url, api_key=options.api_key, timeout_s=options.timeout_s, keeps_connections=True
    )
    try:
        yield client
    finally:
        client.close()


async def _run(options: LoadOptions, progress: Progress) -> dict[str, Any]:
    with _client(options) as client:
        calls = list(await _calls(options, client))
        cpu_before = _cpu_s()
        began = time.perf_counter()
        outcomes, late_s = await _send_all(options, client, calls, progress)
    duration_s = time.perf_counter() - began
    result = summarise(outcomes, duration_s, options.slo_ttft_s, options.slo_tpot_s)
    result["client_cpu_s"] = round(_cpu_s() - cpu_before, 3)
    if late_s:
        result["send_lateness_s"] = percentiles(late_s)
    return result


async def _calls(options: LoadOptions, client: StreamingClient) -> Iterable[Call]:
    common: dict[str, Any] = {
        "model": options.model,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.trace is not None:
        rows = read_trace(options.trace, options.requests)
        context = await _max_context_tokens(client, options.model)
        return trace_calls(rows, common, speed=options.speed, max_context_tokens=context)
    common["max_tokens"] = options.max_tokens
    if options.ignore_eos:
        common["ignore_eos"] = True
    return prompt_calls(read_prompts(options.prompts), common, options.requests, options.rate, options.seed)


async def _max_context_tokens(client: StreamingClient, model: str) -> int | None:
    try:
        models = (await client.get("/models"))["data"]
    except (OSError, KeyError) as error:
        raise ValueError(f"the server does not list its models: {error}") from None
    return next((card.get("max_model_len") for card in models if card["id"] == model), None)


async def _send_all(
    options: LoadOptions, client: StreamingClient, calls: Sequence[Call], progress: Progress
) -> tuple[list[Outcome], list[float]]:
    """Every call's outcome, and for calls with a due time how late each was sent."""
    outcomes: list[Outcome] = []
    late_s: list[float] = []
    num_failed = 0
    began = time.perf_counter()

    async def send(call: Call) -> None:
        nonlocal num_failed
        if call.due_s is not None:
            late_s.append(time.perf_counter() - began - call.due_s)
        outcome = await client.stream(call.path, call.body)
        outcomes.append(outcome)
        num_failed += outcome.error is not None
        progress(len(outcomes), num_failed)

    if calls and calls[0].due_s is not None:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                await asyncio.sleep((call.due_s or 0.0) - (time.perf_counter() - began))
                group.create_task(send(call))
    else:
        waiting = iter(calls)

        async def one_after_another() -> None:
            for call in waiting:
                await send(call)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(options.concurrency, len(calls))):
                group.create_task(one_after_another())
    return outcomes, late_s


def summarise(
    outcomes: Sequence[Outcome], duration_s: float, slo_ttft_s: float | None, slo_tpot_s: float | None
) -> dict[str, Any]:
    """The figures of a run. Latencies are of completed requests; what no request could tell is None."""
    completed = [outcome for outcome in outcomes if outcome.error is None]
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    output_tokens = sum(outcome.output_tokens or 0 for outcome in completed)
    prompt_tokens = sum(outcome.prompt_tokens or 0 for outcome in completed)
    told = [outcome for outcome in completed if outcome.cached_tokens is not None and outcome.prompt_tokens]
    told_tokens = sum(outcome.prompt_tokens or 0 for outcome in told)
    good = [outcome for outcome in completed if meets(outcome, slo_ttft_s, slo_tpot_s)]
    return {
        "requests": len(outcomes),
        "completed": len(completed),
        "failed": len(failed),
        "duration_s": round(duration_s, 6),
        "requests_per_s": len(completed) / duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (output_tokens + prompt_tokens) / duration_s,
        "ttft_s": percentiles([o.ttft_s for o in completed if o.ttft_s is not None]),
        "tpot_s": percentiles([o.tpot_s for o in completed if o.tpot_s is not None]),
        "itl_s": percentiles([gap for o in completed for gap in o.gaps_s]),
        "e2e_s": percentiles([o.e2e_s for o in completed]),
        "good": len(good),
        "goodput_requests_per_s": len(good) / duration_s,
        "slo": {"ttft_s": slo_ttft_s, "tpot_s": slo_tpot_s},
        "cached_token_share": (
            sum(outcome.cached_tokens or 0 for outcome in told) / told_tokens if told_tokens else None
        ),
        "tpot_formula": TPOT_FORMULA,
        "finish_reasons": dict(Counter(str(outcome.finish_reason) for outcome in completed)),
        "errors": dict(Counter(str(outcome.error) for outcome in failed).most_common(10)),
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 (linear between ranks) and the mean; None for each without values."""
    ordered = sorted(values)
    return {
        **{name: _percentile(ordered, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "mean": sum(ordered) / len(ordered) if ordered else None,
    }


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    rank = (len(ordered) - 1) * share
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def meets(outcome: Outcome, slo_ttft_s: float | None, slo_tpot_s: float | None) -> bool:
    """Whether a completed request kept every objective given; one without a measured TPOT has a single token."""
    if slo_ttft_s is not None and (outcome.ttft_s is None or outcome.ttft_s > slo_ttft_s):
        return False
    return slo_tpot_s is None or outcome.tpot_s is None or outcome.tpot_s <= slo_tpot_s


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
