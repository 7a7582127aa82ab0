"""What breaks during a run: every request ends, from the pool or computed again, at instants worked out by hand."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from app.twin.errors import TwinError
from app.twin.faults import Fault, parse_faults
from app.twin.outcome import Outcome
from app.twin.pool import TwinPool
from app.twin.replay import replay
from app.twin.scenario import Scenario
from app.twin.simulator import Simulator
from app.twin.trace import Request, read
from tests.app.twin.clockwork import ClockworkMachine, spec
from tests.app.twin.small_trace import write_trace


def run(requests: list[Request], faults: str = "", wire: float | None = None, **changes: object) -> Outcome:
    machine = ClockworkMachine(wire_bytes_per_s=wire)
    return Simulator(machine, spec(faults=parse_faults(faults), **changes)).run(requests)


def test_faults_are_read_as_they_are_written() -> None:
    assert parse_faults(" decode:3@600, l2:0.0@1.5-900 ,,") == (
        Fault("decode", 600.0, None, index=3),
        Fault("fabric", 1.5, 900.0, component="l2:0.0"),
    )
    assert [str(f) for f in parse_faults("pool:7@0.5-2,optic:1.2.3@4")] == ["pool:7@0.5-2", "optic:1.2.3@4"]


@pytest.mark.parametrize(
    ("faults", "named"),
    [
        ("decode:0", "'decode:0' is not WHAT@START"),
        ("decode:0@soon", "'decode:0@soon'"),
        ("node:1@9-9", "ends before"),
        ("pool:x@9", "whole number after pool:"),
        ("prefill:6@9", "last one is prefill:5"),
        ("decode:1@9", "last one is decode:0"),
        ("node:48@9", "last one is node:47"),
        ("l2:7.0@9", "l2:7.0"),
        ("gpu:1@9", "gpu:1"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_by_name(faults: str, named: str) -> None:
    with pytest.raises(TwinError, match=f"^faults: .*{named}"):
        Scenario(faults=faults)


def test_an_answer_goes_on_where_another_decode_instance_has_room() -> None:
    # 8 tokens of prompt: first token at 8 ms, decoding from 0.258 s in steps of 1 s. The instance breaks at 2.5 s: two
    # steps are done, three tokens known. The pool has the 8 prompt tokens; the other 3 are computed (3 ms), which gives
    # the fourth; 0.25 s of handover, then the last six of ten in steps of 1 s.
    requests = [Request(0.0, 8, 10, (1, 2))]
    whole = run(requests, decode_instances=2).jobs[0]
    assert whole.finished_at == pytest.approx(0.258 + 9.0)
    outcome = run(requests, faults=f"decode:{whole.decode - 1}@2.5", decode_instances=2)
    (job,) = outcome.jobs
    assert job.decode != whole.decode
    assert job.first_token_at == pytest.approx(0.008)
    assert job.finished_at == pytest.approx(2.5 + 0.003 + 0.25 + 6.0)
    assert (job.num_generated, job.hit_tokens) == (10, 0)
    # of the 8 + 2 tokens whose KV was lost, the pool had 8
    assert (outcome.num_restarted, outcome.recomputed_tokens) == (1, 2)


def test_the_last_decode_instance_comes_back_and_finds_everyone_waiting() -> None:
    requests = [Request(0.1 * i, 8, 3, ()) for i in range(5)]
    outcome = run(requests, faults="decode:0@1-50")
    assert all(job.num_generated == 3 for job in outcome.jobs)
    assert min(job.finished_at or 0 for job in outcome.jobs) > 50
    never = run(requests, faults="decode:0@1")
    assert all(job.finished_at is None for job in never.jobs)


def test_a_prefill_instance_that_breaks_takes_the_handovers_under_way_along() -> None:
    # 400 B leave at 0.4 s over a wire of 1000 B/s and would arrive at 0.8 s; at 0.5 s their source breaks. All full
    # blocks but the last are in the pool (a step computes at least one token): 4 ms, then 401 B in 0.401 s, the
    # first token being known; the step of 1 s gives the third and last.
    request = Request(0.0, 400, 3, tuple(range(100)))
    outcome = run([request], faults="prefill:0@0.5", wire=1000, prefill_instances=2)
    (job,) = outcome.jobs
    assert job.prefill == 1
    assert job.first_token_at == pytest.approx(0.4)
    assert job.finished_at == pytest.approx(0.5 + 0.001 + 0.401 + 1.0)


def test_a_link_that_loses_half_its_rate_slows_what_is_on_it() -> None:
    # 100 of 400 B are through at 0.5 s; the rest takes 0.6 s at 500 B/s
    outcome = run([Request(0.0, 400, 2, ())], faults="half@0.5", wire=1000)
    assert outcome.jobs[0].finished_at == pytest.approx(0.5 + 0.6 + 1.0)


def test_a_lost_pool_server_takes_its_blocks_and_no_others() -> None:
    pool = TwinPool(10, None, num_servers=4)
    blocks = list(range(1000))
    pool.publish(blocks, 0.0)
    of_two = [block for block in blocks if pool.server_of(block) == 2]
    assert 200 < len(of_two) < 300
    assert pool.lose_server(2, 1.0) == pool.num_lost == len(of_two)
    assert [b for b in blocks if not pool.lookup([b])] == of_two
    # their names go to the next server; the space is a quarter less
    assert {pool.server_of(block) for block in of_two} == {3}
    pool.restore_server(2)
    assert {pool.server_of(block) for block in of_two} == {2}
    small = TwinPool(10, 10_000, num_servers=4)
    small.publish(blocks, 0.0)
    small.lose_server(2, 1.0)
    small.publish(of_two, 2.0)
    assert small.used_bytes == 7500
    assert small.num_evicted == 250


def test_a_pool_without_servers_holds_nothing_and_nobody_fails() -> None:
    requests = [Request(float(i), 8, 2, (1, 2)) for i in range(4)]
    outcome = run(requests, faults="pool:0@1.5")
    assert all(job.finished_at is not None for job in outcome.jobs)
    assert [job.hit_tokens for job in outcome.jobs] == [0, 8, 0, 0]


def test_a_node_takes_its_instances_and_its_part_of_the_pool(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl"))
    # nodes 0 and 1 hold the first of six prefill instances (16 NPUs)
    result = replay(requests, Scenario(faults="node:1@30"))
    assert result["completed"] == 300
    assert result["pool"]["lost_blocks"] > 0
    assert result["faults"]["slowdown"]["e2e_mean"] > 1
    assert result["without_faults"]["slo_attainment"] >= result["slo_attainment"]
    assert result["without_faults"]["pool"]["lost_blocks"] == 0


def test_lost_components_of_the_fabric_slow_steps_from_then_on(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl", 60))
    # six of seven sub-planes of node 12 gone: its NPUs, and those that wait for them, have a seventh of the lanes
    lost = ",".join(f"l1:12.{k}@5" for k in range(6))
    result = replay(requests, Scenario(faults=lost))
    assert result["completed"] == 60
    assert result["faults"]["slowdown"]["tpot_mean"] > 1.03
    assert replay(requests, Scenario(faults="l2:0.0@5"))["faults"]["slowdown"]["tpot_mean"] < 1.001


def test_an_npu_without_network_cards_lets_the_others_of_its_instance_send() -> None:
    cut_off = Scenario(failed="nic:0,nic:1", prefill_npus=1, prefill_instances=1)
    assert replay([Request(0.0, 4096, 4, ())], cut_off)["completed"] == 0
    requests = [Request(float(i), 4096, 4, ()) for i in range(20)]
    assert replay(requests, Scenario(faults="nic:0@3,nic:1@3"))["completed"] == 20


FAULTS = ("prefill:0", "prefill:1", "decode:0", "decode:1", "node:0", "pool:0", "half")


def random_run(seed: int) -> Outcome:
    """Up to 60 requests in 20 s with shared prefixes, up to 8 faults that pass, some with wires or the autoscaler."""
    random = Random(seed)
    lengths = (4, 8, 12, 100, 101, 300, random.randint(1, 300))
    trace = [
        Request(random.uniform(0, 20), random.choice(lengths), random.randint(1, 30), ())
        for _ in range(random.randint(1, 60))
    ]
    trace = [
        replace(request, blocks=tuple(range(min(random.randint(0, 80), request.prompt_tokens // 4))))
        for request in sorted(trace, key=lambda request: request.arrival_s)
    ]
    faults = []
    for _ in range(random.randint(0, 8)):
        start_s = random.uniform(0, 30)
        faults.append(f"{random.choice(FAULTS)}@{start_s:.3f}-{start_s + random.uniform(0.02, 20):.3f}")
    machine = ClockworkMachine(
        step_s=0.05,
        sequence_s=0.01,
        wire_bytes_per_s=random.choice([None, 200.0, 2000.0]),
        decode_kv_tokens=800,
    )
    return Simulator(
        machine,
        spec(
            prefill_instances=2,
            decode_instances=2,
            faults=parse_faults(",".join(faults)),
            autoscale=random.random() < 0.5,
            slo_ttft_s=0.5,
            slo_tpot_s=0.06,
            role_switch_s=1.0,
            max_running_per_decode=4,
        ),
    ).run(trace)


def test_whatever_breaks_and_comes_back_every_answer_is_complete() -> None:
    restarts = turns = 0
    for seed in range(100):
        outcome = random_run(seed)
        for job in outcome.jobs:
            assert job.finished_at is not None, seed
            assert job.first_token_at is not None, seed
            assert job.arrived_at <= job.first_token_at <= job.finished_at, seed
            assert job.num_generated == job.request.output_tokens, seed
            assert job.blocks == [], seed
        assert all(unit.num_incoming == 0 for unit in outcome.units), seed
        assert outcome.handover_s >= outcome.handover_idle_s - 1e-6, seed
        restarts, turns = restarts + outcome.num_restarted, turns + len(outcome.role_changes)
    assert restarts > 100
    assert turns > 10
