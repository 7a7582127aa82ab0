"""The load client: figures by hand, workloads from files, and a run against a real gateway."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from app.bench.client import Outcome, StreamingClient
from app.bench.load import LoadOptions, percentiles, run_load, summarise
from app.bench.workload import WorkloadError, prompt_calls, read_prompts, read_trace, trace_calls
from tests.app.conftest import MODEL, disaggregated, serving


def outcome(started: float, first: float, last: float, ended: float, tokens: int, **more: Any) -> Outcome:
    values: dict[str, Any] = {"prompt_tokens": 10, "cached_tokens": 5, "finish_reason": "stop", **more}
    return Outcome(
        started_at=started, first_at=first, last_at=last, ended_at=ended, output_tokens=tokens, **values
    )


def test_figures_by_hand() -> None:
    outcomes = [
        outcome(0.0, 1.0, 3.0, 3.5, 5),  # TTFT 1, TPOT (3 - 1) / 4 = 0.5, end to end 3.5
        outcome(0.0, 3.0, 4.0, 4.5, 2),  # TTFT 3, TPOT 1, end to end 4.5
        outcome(0.0, 0.5, 0.5, 0.5, 1),  # TTFT 0.5, no TPOT
        Outcome(started_at=0.0, ended_at=9.0, error="status 500"),
    ]
    result = summarise(outcomes, 10.0, slo_ttft_s=2.0, slo_tpot_s=0.6)
    assert (result["requests"], result["completed"], result["failed"]) == (4, 3, 1)
    assert result["output_tokens_per_s"] == 0.8
    assert result["total_tokens_per_s"] == 3.8
    assert result["ttft_s"]["p50"] == 1.0
    assert result["tpot_s"]["p50"] == 0.75
    assert result["e2e_s"]["p90"] == pytest.approx(
        4.3
    )  # ranks 0..2 hold 0.5, 3.5, 4.5; 1.8 lies between the last
    assert result["goodput_requests_per_s"] == 0.2
    assert result["cached_token_share"] == 0.5
    assert result["errors"] == {"status 500": 1}


def test_nothing_is_null_not_zero() -> None:
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None, "mean": None}
    assert summarise([Outcome(0.0, error="x")], 1.0, None, None)["cached_token_share"] is None


def test_traces_keep_their_sharing(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 500, "input_length": 700, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 2500, "input_length": 1500, "output_length": 9000, "hash_ids": [1, 2, 3]},
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    first, second = trace_calls(read_trace(trace, None), {"model": "m"}, speed=2, max_context_tokens=2048)
    assert (first.due_s, second.due_s) == (0.0, 1.0)
    one, two = json.loads(first.body), json.loads(second.body)
    assert (len(one["prompt"]), one["max_tokens"]) == (700, 3)
    assert (len(two["prompt"]), two["max_tokens"]) == (1024, 1024)  # cut to the context
    assert one["prompt"] == two["prompt"][:700]


def test_azure_traces(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,396,109\n"
    )
    rows = read_trace(trace, None)
    assert [(row.at_s, row.input_tokens, row.output_tokens) for row in rows] == [(0, 374, 44), (1, 396, 109)]


def test_bad_files_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"y": 1}\n')
    with pytest.raises(WorkloadError, match=r"bad\.jsonl, line 2"):
        read_prompts(bad)
    with pytest.raises(WorkloadError, match=r"bad\.jsonl, request 1"):
        read_trace(bad, None)
    with pytest.raises(WorkloadError, match=r"none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl")


def test_poisson_arrivals_repeat_and_have_the_rate() -> None:
    def due(seed: int) -> list[float]:
        return [call.due_s or 0.0 for call in prompt_calls(read_prompts(None), {}, 2000, 10.0, seed)]

    assert due(1) == due(1) != due(2)
    assert due(1)[-1] / 2000 == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("rate", [None, 200.0])
async def test_a_run_against_a_gateway(served: Any, rate: float | None) -> None:
    async with serving(served, disaggregated()) as gateway:
        result = await asyncio.to_thread(
            run_load,
            LoadOptions(
                base_url=gateway.url, model=MODEL, requests=20, max_tokens=9, rate=rate, ignore_eos=True
            ),
        )
    assert (result["completed"], result["failed"]) == (20, 0)
    assert result["output_tokens"] == 180
    assert result["finish_reasons"] == {"length": 20}
    assert result["ttft_s"]["p50"] > 0
    # The echo worker answers so quickly that all tokens may arrive in one read: then no time passed between them.
    assert 0 <= result["tpot_s"]["p50"] < result["duration_s"]


async def test_failures_are_counted_with_their_words(served: Any) -> None:
    async with serving(served, disaggregated()) as gateway:
        result = await asyncio.to_thread(
            run_load, LoadOptions(base_url=gateway.url + "/v1", model="nobody", requests=3)
        )
    assert (result["completed"], result["failed"]) == (0, 3)
    (message,) = result["errors"]
    assert message.startswith("status 404: the model 'nobody'")


def test_a_base_url_must_be_one() -> None:
    with pytest.raises(ValueError, match="base-url"):
        StreamingClient("ftp://x", api_key=None, timeout_s=1)
