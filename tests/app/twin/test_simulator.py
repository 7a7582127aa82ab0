import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from app.twin.faults import parse_faults
from app.twin.machine import SupernodeMachine
from app.twin.pictures import pareto_points
from app.twin.recommend import recommend
from app.twin.replay import deployment, percentiles, replay
from app.twin.report import write_report
from app.twin.scenario import Scenario
from app.twin.simulator import Simulator
from app.twin.trace import Request, read
from tests.app.twin.clockwork import ClockworkMachine, spec
from tests.app.twin.small_trace import write_trace


def test_one_request_by_hand() -> None:
    outcome = Simulator(ClockworkMachine(), spec()).run([Request(2.0, 10, 4, ())])
    (job,) = outcome.jobs
    # 10 tokens at 1 ms, then 0.25 s of handover and three steps for the other three tokens (the phase of a sequence
    # may save a part of a token, never a whole step here: 1 token a step)
    assert job.first_token_at == pytest.approx(2.010)
    assert job.finished_at == pytest.approx(2.010 + 0.25 + 3.0, abs=1.0 + 1e-9)
    assert job.num_generated == 4


def test_a_second_prompt_waits_for_the_first_and_joins_decode_at_a_step() -> None:
    first, second = (
        Simulator(ClockworkMachine(), spec()).run([Request(0.0, 500, 10, ()), Request(0.1, 200, 2, ())]).jobs
    )
    assert first.first_token_at == pytest.approx(0.5)
    assert second.first_token_at == pytest.approx(0.7)
    # decode of the first began at 0.75; the second arrives at 0.95 and joins when that step ends, at 1.75
    assert second.finished_at == pytest.approx(2.75)


@pytest.mark.parametrize(("gradually", "ends"), [(False, [2.26, 2.26]), (True, [2.26, 3.26])])
def test_answers_join_together_or_one_by_one(gradually: bool, ends: list[float]) -> None:
    # Decode of the first began at 0.26; two more arrive during its first step, which ends at 1.26, and need one step.
    requests = [Request(0.0, 10, 10, ()), Request(0.3, 10, 2, ()), Request(0.4, 10, 2, ())]
    jobs = Simulator(ClockworkMachine(joins_gradually=gradually), spec()).run(requests).jobs
    assert [job.finished_at for job in jobs[1:]] == pytest.approx(ends)


def test_a_prefix_in_the_pool_is_not_computed_again() -> None:
    requests = [Request(0.0, 8, 1, (1, 2)), Request(1.0, 12, 1, (1, 2, 3)), Request(2.0, 12, 1, (1, 2, 3))]
    jobs = Simulator(ClockworkMachine(), spec()).run(requests)
    second, third = jobs.jobs[1:]
    assert second.first_token_at == pytest.approx(1.0 + 4e-3)
    # a whole prompt in the pool still computes its last block: the logits of the last token are wanted
    assert third.first_token_at == pytest.approx(2.0 + 4e-3)
    assert jobs.hit_tokens == 8 + 12


def test_prefill_that_shares_cores_slows_decode_while_it_lasts() -> None:
    machine = ClockworkMachine(shares_cores=True)
    requests = [Request(0.0, 10, 6, ()), Request(1.0, 900, 1, ())]
    slowed = Simulator(machine, spec()).run(requests).jobs[0].finished_at
    alone = Simulator(machine, spec()).run(requests[:1]).jobs[0].finished_at
    assert slowed is not None
    assert alone is not None
    assert alone < slowed <= alone + 2.0 + 1e-9


def test_requests_of_a_broken_instance_are_served_by_another() -> None:
    requests = [Request(0.1 * i, 400, 2, ()) for i in range(8)]
    lost = Simulator(
        ClockworkMachine(), spec(prefill_instances=2, faults=parse_faults("prefill:0@0.45"))
    ).run(requests)
    assert all(job.finished_at is not None for job in lost.jobs)
    assert all(job.prefill == 1 for job in lost.jobs if (job.first_token_at or 0) > 0.45)
    whole = Simulator(ClockworkMachine(), spec(prefill_instances=2)).run(requests)
    assert lost.now > whole.now


def test_when_nobody_can_prefill_requests_fail_and_the_run_ends() -> None:
    outcome = Simulator(ClockworkMachine(), spec(faults=parse_faults("prefill:0@0"))).run(
        [Request(1.0, 4, 1, ())]
    )
    assert outcome.jobs[0].finished_at is None


def test_every_block_comes_back_and_every_token_is_made(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl"))
    scenario = Scenario()
    simulator = Simulator(SupernodeMachine(scenario), deployment(scenario))
    instances = [*simulator.fleet.prefill.values(), *simulator.fleet.decode.values()]
    outcome = simulator.run(requests)
    assert all(
        job.num_generated == job.request.output_tokens or job.request.output_tokens == 1
        for job in outcome.jobs
    )
    for instance in instances:
        instance.scheduler.blocks.check_integrity([])


def test_the_same_seed_gives_the_same_result_and_another_does_not(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl"))
    clock = {"wall_s", "cpu_s", "requests_per_wall_s", "requests_per_cpu_s", "scenario"}

    def run(seed: int) -> dict[str, object]:
        return {k: v for k, v in replay(requests, Scenario(seed=seed)).items() if k not in clock}

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_smaller_pool_finds_less_and_a_faster_trace_waits_longer(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl")
    base = Scenario(prefill_instances=1, num_npus=176)
    whole = replay(read(path), base)
    small = replay(read(path), Scenario(prefill_instances=1, num_npus=176, pool_bytes=5e9))
    fast = replay(read(path, speedup=20), base)
    assert whole["completed"] == whole["requests"] == 300
    assert (
        small["cache_hit_token_share"]
        < whole["cache_hit_token_share"]
        <= whole["ideal_cache_hit_token_share"]
    )
    assert fast["ttft_s"]["p90"] > whole["ttft_s"]["p90"]


def test_percentiles_by_nearest_rank() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99, "mean": 50.5}
    assert percentiles([7.0]) == {"p50": 7, "p90": 7, "p99": 7, "mean": 7}
    assert percentiles([])["p50"] is None


def test_recommendations_meet_what_they_promise(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl"))
    answers = recommend(requests, {}, (0.05, 0.015, 0.001))["answers"]
    assert [a["slo_tpot_s"] for a in answers] == [0.05, 0.015, 0.001]
    easy, hard, impossible = answers
    assert easy["met"]
    assert easy["slo_attainment"] >= 0.9
    assert easy["num_npus"] <= hard["num_npus"]
    # two dollars an NPU hour and half a cent a GB hour
    expected = 2.0 * easy["num_npus"] + easy["pool_bytes"] / 1e9 * 0.005
    assert easy["cost_per_hour"] == pytest.approx(expected)
    assert not impossible["met"]
    assert "fast" in impossible["reason"]


def test_a_plan_hands_kv_over_on_ub_where_rdma_is_too_slow() -> None:
    # 32K tokens are 2.3 GB: 54 ms on a package's two cards, 7 ms on UB. Of an answer of 8 tokens that adds 7.7 ms or
    # 1 ms to the TPOT, and the steps alone take about 15.
    requests = [Request(4.0 * i, 32_768, 8, ()) for i in range(40)]
    tight, loose = recommend(requests, {}, (0.020, 0.050))["answers"]
    assert (tight["met"], tight["handover_plane"]) == (True, "ub")
    assert "on RDMA" in tight["reason"]
    assert (loose["met"], loose["handover_plane"]) == (True, "roce")
    on_rdma = replay(requests, replace(Scenario(**tight["scenario"]), handover_plane="roce"))
    assert on_rdma["slo_attainment"] < 0.9 <= tight["slo_attainment"]
    # asked for UB from the start, there is nothing to fall back on
    (given,) = recommend(requests, {"handover_plane": "ub"}, (0.020,))["answers"]
    assert given["met"]
    assert "reason" not in given


def test_the_report_holds_its_figures(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl", 60))
    write_report(tmp_path / "r.html", Scenario(faults="node:0@3"), requests, tmp_path / "images")
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    names = {"twin-pareto.png", "twin-hits.png", "twin-links.png", "twin-course.png"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == names
    assert "lies outside the range that published results cover" in page
    assert page.count('class="held_out"') >= 12
    points = pareto_points(Scenario())
    assert [p[1] for p in points] == sorted(p[1] for p in points)


@pytest.mark.slow
@pytest.mark.skipif(
    "CLOUDMATRIX_TRACE_DIR" not in os.environ, reason="CLOUDMATRIX_TRACE_DIR names no folder of traces"
)
def test_the_mooncake_conversation_trace() -> None:
    path = Path(os.environ["CLOUDMATRIX_TRACE_DIR"]) / "mooncake_conversation_trace.jsonl"
    requests = read(path)
    started = time.process_time()
    whole = replay(requests, Scenario())
    assert len(requests) / (time.process_time() - started) >= 1000
    assert whole["completed"] == 12_031
    assert whole["cache_hit_token_share"] == pytest.approx(0.374, abs=0.001)
    assert whole["ideal_cache_hit_token_share"] == pytest.approx(0.374, abs=0.001)
    assert replay(requests, Scenario(pool_bytes=1.08e12))["cache_hit_token_share"] == pytest.approx(
        0.332, abs=0.005
    )
