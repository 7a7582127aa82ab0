"""Calibration and drift on records in the gateway's format, made from times that are known."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from app.twin.calibrate import build_profile, fit_load
from app.twin.client import Call, Seen
from app.twin.errors import TwinError
from app.twin.live import against_twin, as_request, is_quiet, simulate, workload
from app.twin.neighbours import Neighbours
from app.twin.profile import Profile
from engine.scheduler import Limits

WORKERS: list[dict[str, Any]] = [
    {"id": "prefill-0", "role": "prefill", "kv_blocks_total": 1000},
    {"id": "decode-0", "role": "decode", "kv_blocks_total": 1000},
]
REQUEST_S, PREFILL_STEP_S, PREFILL_TOKEN_S, CACHED_TOKEN_S = 0.004, 0.010, 0.001, 0.00005
DECODE_FIXED_S, DECODE_SEQUENCE_S, HANDOVER_S = 0.008, 0.002, 0.015
CHUNK = Limits().max_step_tokens


def seen(prompt: tuple[int, ...], batch: int, cached: int = 0, tokens: int = 24, slower: float = 1.0) -> Seen:
    rest = len(prompt) - cached
    prefill_s = slower * (
        -(-rest // CHUNK) * PREFILL_STEP_S + rest * PREFILL_TOKEN_S + cached * CACHED_TOKEN_S
    )
    step_s = DECODE_FIXED_S + batch * DECODE_SEQUENCE_S
    first = REQUEST_S + prefill_s
    second = first + HANDOVER_S + step_s
    at = (first, *(second + i * step_s for i in range(tokens - 1)))
    record = {
        "request_id": "r",
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": tokens, "cached_tokens": cached},
        "timeline": [{"phase": "prefill", "start_s": 0.002, "duration_s": prefill_s, "where": "prefill-0"}],
        "transfers": [{"kind": "publish", "src": "die:0", "dst": "cpu:1", "num_bytes": 737_280, "measured_s": None,
                       "ub_s": 1e-5, "roce_s": 4e-5}],
    }  # fmt: skip
    return Seen(Call(0.0, prompt, tokens), 0.0, at, tokens, record)


def profile() -> Profile:
    random = Random(3)
    prompts = [tuple(random.randrange(300, 4000) for _ in range(n)) for n in (16, 64, 160, 320, 512, 768) * 2]
    idle = [seen(p, 1) for p in prompts]
    again = [seen(p, 1, cached=(len(p) - 1) // 32 * 32, tokens=2) for p in prompts]
    batches = [[seen(prompts[0], b, tokens=48) for _ in range(b)] for b in (2, 4, 8)]
    mixed = [seen(prompts[0], 2, tokens=160) for _ in range(2)]
    mixed += [seen(prompts[4], 1, tokens=2, slower=1.5) for _ in range(5)]
    return build_profile("m", WORKERS, idle, again, batches, mixed)


def test_known_times_are_found_again() -> None:
    found = profile()
    assert found.request_fixed_s == pytest.approx(REQUEST_S)
    assert found.prefill_step_s == pytest.approx(PREFILL_STEP_S, rel=0.01)
    assert found.prefill_token_s == pytest.approx(PREFILL_TOKEN_S, rel=0.01)
    assert found.prefill_attended_s == pytest.approx(0, abs=1e-7)
    assert found.cached_token_s == pytest.approx(CACHED_TOKEN_S, rel=0.05)
    assert found.decode_fixed_s == pytest.approx(DECODE_FIXED_S, rel=0.01)
    assert found.decode_sequence_s == pytest.approx(DECODE_SEQUENCE_S, rel=0.01)
    assert found.handover_s == pytest.approx(HANDOVER_S, rel=0.01)
    assert found.prefill_slowdown == pytest.approx(1.5, rel=0.01)
    assert (found.kv_bytes_per_token, found.decode_kv_tokens) == (23_040, 32_000)
    assert found.fit_error < 0.01


def test_a_profile_survives_its_file_and_a_bad_one_is_named(tmp_path: Path) -> None:
    profile().write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == profile()
    (tmp_path / "bad.json").write_text('{"model": "m"}')
    with pytest.raises(TwinError, match=r"bad\.json.*num_prefill"):
        Profile.read(tmp_path / "bad.json")


def test_the_twin_of_a_service_says_what_the_service_takes() -> None:
    prompt = tuple(range(300, 300 + 320))
    (job,) = simulate([as_request(seen(prompt, 1), 32)], profile()).jobs
    # 320 tokens in chunks, then the handover and 23 decode steps of 10 ms
    prefill_s = -(-320 // CHUNK) * PREFILL_STEP_S + 320 * PREFILL_TOKEN_S
    assert job.first_token_at == pytest.approx(prefill_s, rel=0.01)
    assert job.finished_at == pytest.approx(prefill_s + HANDOVER_S + 23 * 0.010, rel=0.03)


def test_drift_raises_the_alarm_and_names_what_drifted() -> None:
    random = Random(9)
    run = []
    for i in range(12):
        one = seen(tuple(random.randrange(300, 4000) for _ in range(64 + 20 * i)), 1)
        run.append(Seen(one.call, 3.0 * i, one.token_at_s, one.completion_tokens, one.record))
    agreed = against_twin(run, profile())
    assert agreed["drift_alarm"] is False, agreed["errors"]
    slow = [
        Seen(s.call, s.sent_at_s, tuple(t * 1.4 for t in s.token_at_s), s.completion_tokens, s.record)
        for s in run
    ]
    drifted = against_twin(slow, profile())
    assert drifted["drift_alarm"]
    assert {"ttft_p50", "tpot_p50"} <= set(drifted["drifted"])
    assert "cache_hit_token_share" not in drifted["drifted"]


def test_a_load_moves_what_the_parts_got_wrong_back_to_what_was_seen() -> None:
    random = Random(5)
    load = []
    for i in range(24):
        one = seen(tuple(random.randrange(300, 4000) for _ in range(64 + 20 * i)), 1)
        load.append(Seen(one.call, 3.0 * i, one.token_at_s, one.completion_tokens, one.record))
    true = profile()
    wrong = replace(true, prefill_token_s=2 * true.prefill_token_s, decode_fixed_s=0.5 * true.decode_fixed_s)
    assert against_twin(load, wrong)["drift_alarm"]
    found = fit_load(wrong, load)
    assert (found.load_samples, found.alone_samples) == (24, 24)
    assert against_twin(load, found)["drift_alarm"] is False
    with pytest.raises(TwinError, match="no requests"):
        fit_load(true, [])


def test_requests_beside_neighbours_do_not_count_unless_most_are() -> None:
    random = Random(9)
    run = []
    for i in range(12):
        one = seen(tuple(random.randrange(300, 4000) for _ in range(64 + 20 * i)), 1)
        # every third request took three times as long, and others used the machine meanwhile
        slower, cores = (3.0, 1.0) if i % 3 == 0 else (1.0, 0.0)
        times = tuple(t * slower for t in one.token_at_s)
        run.append(Seen(one.call, 5.0 * i, times, one.completion_tokens, one.record, cores))
    assert [is_quiet(s) for s in run[:3]] == [False, True, True]
    found = against_twin(run, profile())
    assert (found["disturbed"], found["drift_alarm"]) == (4, False), found["errors"]
    crowded = [replace(s, neighbour_cores=1.0) for s in run]
    assert against_twin(crowded, profile())["live_measured"]["ttft_s"]["p99"] == max(s.ttft_s for s in run)


def test_neighbours_are_seen_and_the_service_is_not_one() -> None:
    burn = [sys.executable, "-c", "while True: pass"]
    worker = [*burn, "engine.server"]
    with subprocess.Popen(worker) as service:
        try:
            with Neighbours([service.pid]) as neighbours:
                began = time.perf_counter()
                with subprocess.Popen(burn) as other:
                    time.sleep(1.0)
                    other.kill()
                share = neighbours.share(began, began + 1.0)
        finally:
            service.kill()
    # one of at least two processes that burn is the service's own; the other must be seen
    assert share is not None
    assert share > 0.3
    assert Neighbours([1]).share(0, 1) is None


def test_blocks_are_named_by_all_that_comes_before() -> None:
    shared, other = tuple(range(300, 364)), tuple(range(400, 464))
    a, b, c = (as_request(seen(p, 1), 32).blocks for p in (shared + other, shared, other + shared))
    assert len(a) == 4
    assert a[:2] == b
    assert not set(a) & set(c)


def test_the_workload_repeats_its_shape_but_not_its_tokens() -> None:
    a, b = workload(20, 1.0, 7), workload(20, 1.0, 7)
    assert [(c.at_s, len(c.prompt), c.max_tokens) for c in a] == [
        (c.at_s, len(c.prompt), c.max_tokens) for c in b
    ]
    assert [c.prompt for c in a] != [c.prompt for c in b]
