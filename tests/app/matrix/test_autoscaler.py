"""The P/D decision, by hand, and one live service that turns a worker's role by itself."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.matrix.autoscaler import Decision, Memory, Observation, Policy, WorkerLoad, decide
from tests.service.running import running

POLICY = Policy(ttft_target_s=2.0, tpot_target_s=0.05, sustain_s=3.0, cooldown_s=15.0)


def worker(
    name: str, role: Any, running: int = 0, waiting: int = 0, queued: int = 0, **more: Any
) -> WorkerLoad:
    return WorkerLoad(
        worker_id=name, role=role, state=more.get("state", "ready"), num_running=running, num_waiting=waiting,
        num_queued_tokens=queued, kv_share=more.get("kv", 0.0),
    )  # fmt: skip


P1, D1, D2 = worker("p1", "prefill"), worker("d1", "decode", running=4), worker("d2", "decode", running=1)


def run(observations: list[Observation], policy: Policy = POLICY) -> list[Decision]:
    memory, found = Memory(), []
    for seen in observations:
        found.append(decide(policy, memory, seen))
        memory = found[-1].memory
    return found


def slow_prefill(now: float, **more: Any) -> Observation:
    # TTFT of 5 s against 2; decode at 0.01 / 0.05 = 0.2, with one of two workers gone 0.4: it can spare one
    given: dict[str, Any] = {"workers": [P1, D1, D2], "ttft_s": 5.0, "tpot_s": 0.01, "now": now}
    return Observation(**(given | more))


def test_a_lack_must_last_and_then_the_emptiest_worker_turns() -> None:
    first, second, third = run([slow_prefill(0.0), slow_prefill(2.9), slow_prefill(3.0)])
    assert (first.change, second.change) == (None, None)
    assert third.change is not None
    assert (third.change.worker_id, third.change.role) == ("d2", "prefill")
    assert third.num_workers == {"prefill": 2, "decode": 1}
    assert third.prefill_pressure == pytest.approx(2.5)
    assert third.decode_pressure == pytest.approx(0.2)


def test_a_lack_that_goes_away_starts_over() -> None:
    fine = replace(slow_prefill(2.0), ttft_s=1.0)
    assert run([slow_prefill(0.0), fine, slow_prefill(3.0), slow_prefill(5.9)])[-1].change is None


def test_after_a_change_there_is_rest() -> None:
    workers = [P1, D1, D2, worker("d3", "decode")]
    seen = [slow_prefill(t, workers=workers) for t in (0.0, 3.0, 6.0, 17.9, 18.0)]
    assert [d.change is not None for d in run(seen)] == [False, True, False, False, True]


def test_nobody_gives_what_it_needs_itself() -> None:
    # decode at 0.8: with one worker less it would be at 1.6
    both_slow = [slow_prefill(t, tpot_s=0.04) for t in (0.0, 4.0)]
    assert run(both_slow)[-1].change is None
    # the last decode worker stays
    alone = [slow_prefill(t, workers=[P1, D1]) for t in (0.0, 4.0)]
    assert run(alone)[-1].change is None


def test_a_worker_under_way_is_waited_for() -> None:
    draining = [P1, D1, D2, worker("d3", "decode", state="draining")]
    assert run([slow_prefill(t, workers=draining) for t in (0.0, 4.0)])[-1].change is None


def test_queued_tokens_count_before_anyone_has_waited() -> None:
    # 40,000 tokens at 4,000 a second are 10 s on one worker
    queued = [worker("p1", "prefill", queued=40_000), D1, D2]
    seen = [slow_prefill(t, workers=queued, ttft_s=None, prefill_tokens_per_s=4000.0) for t in (0.0, 3.0)]
    found = run(seen)[-1]
    assert found.prefill_pressure == pytest.approx(5.0)
    assert found.change is not None
    assert found.change.role == "prefill"


@pytest.mark.parametrize(
    "more",
    [
        {"tpot_s": 0.08},
        {"workers": [P1, worker("p2", "prefill"), worker("d1", "decode", running=8, kv=0.95)]},
        {"workers": [P1, worker("p2", "prefill"), worker("d1", "decode", running=8, waiting=3)]},
    ],
)
def test_decode_that_is_slow_or_full_gets_a_prefill_worker(more: dict[str, Any]) -> None:
    given = {"workers": [P1, worker("p2", "prefill"), D1], "ttft_s": 0.3} | more
    found = run([slow_prefill(t, **given) for t in (0.0, 3.0)])[-1]
    assert found.change is not None
    assert (found.change.worker_id, found.change.role) == ("p2", "decode")


def test_workers_that_do_both_count_for_both_and_stay() -> None:
    both = [worker("b1", "both"), worker("b2", "both")]
    assert run([slow_prefill(t, workers=both) for t in (0.0, 4.0)])[-1].change is None


@pytest.mark.parametrize(
    ("values", "named"),
    [({"ttft_target_s": 0}, "ttft_target_s"), ({"spare_pressure": 1.0}, "spare_pressure"),
     ({"cooldown_s": -1}, "cooldown_s"), ({"min_workers": 0}, "min_workers")],
)  # fmt: skip
def test_impossible_policies_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Policy(**values)


@pytest.mark.slow
async def test_a_live_service_turns_a_decode_worker_when_prompts_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDMATRIX_AUTOSCALE_TTFT_S", "0.2")
    monkeypatch.setenv("CLOUDMATRIX_AUTOSCALE_TPOT_S", "1")
    with running(tmp_path, "--prefill", "1", "--decode", "2", "--no-console", "--autoscale") as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=120, trust_env=False) as client:

            async def prompts(which: int) -> None:
                for number in range(1000):
                    prompt = [300 + (which * 7919 + number * 104_729 + i * 31) % 3000 for i in range(600)]
                    body = {"model": "smollm2-135m", "prompt": prompt, "max_tokens": 4}
                    (await client.post("/v1/completions", json=body)).raise_for_status()

            load = [asyncio.create_task(prompts(i)) for i in range(8)]
            roles: list[str] = []
            deadline = time.monotonic() + 60
            while roles.count("prefill") < 2 and time.monotonic() < deadline:
                await asyncio.sleep(0.5)
                workers = (await client.get("/api/workers")).json()["workers"]
                roles = [w["role"] for w in workers if w["state"] == "ready"]
            told = (await client.get("/api/autoscaler")).json()
            for task in load:
                task.cancel()
            # Nothing of the load was lost on the way: a task that failed would have raised.
            ended = await asyncio.gather(*load, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
    assert roles.count("prefill") == 2, told
    assert told["enabled"]
    assert told["changes"][0]["role"] == "prefill"
    assert told["changes"][0]["error"] is None
    assert "prefill at" in told["changes"][0]["reason"]
