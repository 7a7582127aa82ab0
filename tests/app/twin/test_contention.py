"""Transfers that overlap in the simulation share links; every instant here is worked out by hand."""

import pytest

from app.twin.machine import SupernodeMachine
from app.twin.replay import deployment, summarise
from app.twin.scenario import Scenario
from app.twin.simulator import Simulator
from app.twin.trace import Request
from app.twin.transfers import Cargo, Shipment, Transfers
from tests.app.twin.clockwork import ClockworkMachine, spec

KV_4K = 4096 * 70_272


def cargo(shipment: Shipment, now: float = 0.0) -> Cargo:
    return Cargo("handed_over", 0, now, shipment)


def arrivals(transfers: Transfers, now: float = 1.0) -> list[float]:
    return [at for at, _, _ in transfers.arrived(now)]


def test_two_handovers_over_one_wire_take_twice_as_long() -> None:
    # Two prompts of 400 tokens on two instances are both computed at 0.4 s; 400 B at 1000 B/s alone take 0.4 s, two at
    # half the rate 0.8 s. One token is left to each: a step of 1 s, and the one that is let in second waits for the
    # step of the first.
    requests = [Request(0.0, 400, 2, ())] * 2
    two = spec(prefill_instances=2)
    alone = Simulator(ClockworkMachine(wire_bytes_per_s=1000), two).run(requests[:1])
    both = Simulator(ClockworkMachine(wire_bytes_per_s=1000), two).run(requests)
    assert [job.first_token_at for job in both.jobs] == pytest.approx([0.4, 0.4])
    assert alone.jobs[0].finished_at == pytest.approx(0.4 + 0.4 + 1.0)
    assert [job.finished_at for job in both.jobs] == pytest.approx([0.4 + 0.8 + 1.0, 0.4 + 0.8 + 2.0])
    assert (both.handover_s, both.handover_idle_s) == pytest.approx((1.6, 0.8))


def test_a_handover_that_joins_later_slows_the_first_only_from_then_on() -> None:
    # 0.4 s: the first has the wire to itself and sends 200 of its 400 B; from 0.6 s both send 500 B/s, the first is
    # through at 1.0 s, the second has 200 of its 400 B left and the wire to itself: 1.2 s.
    wire = Transfers({"wire": 1000.0})
    machine = ClockworkMachine(wire_bytes_per_s=1000)
    wire.start(0, cargo(machine.handover(400, 0, 1), 0.4), 0.4)
    wire.start(1, cargo(machine.handover(400, 0, 1), 0.6), 0.6)
    assert wire.next_at() == pytest.approx(1.0)
    assert arrivals(wire, 1.0 + 1e-9) == pytest.approx([1.0])
    assert arrivals(wire, 2.0) == pytest.approx([1.2])


def test_on_the_supernode_handovers_out_of_one_package_share_its_cards() -> None:
    machine = SupernodeMachine(Scenario())
    transfers = Transfers(machine.capacity())
    for number, dst_npu in enumerate((100, 200)):
        transfers.start(number, cargo(machine.handover(4096, 0, dst_npu)), 0.0)
    # two cards of 25 GB/s at 85 % for 2 x 287.8 MB, and 5 us of latency: 13.55 ms instead of 6.78
    assert arrivals(transfers) == pytest.approx([2 * KV_4K / 42.5e9 + 5e-6] * 2)


def test_pool_loads_share_what_their_instance_can_take() -> None:
    machine = SupernodeMachine(Scenario())
    # 16 NPUs of 2 dies, a die's share of the CPUs' ports is 4 x 160 GB/s / 16 = 40 GB/s: 1.28 TB/s for the instance
    alone_s = KV_4K / 1.28e12
    assert machine.load(4096, 0).idle_s == pytest.approx(alone_s)
    for units, expected in (((0, 0), 2 * alone_s), ((0, 1), alone_s)):
        transfers = Transfers(machine.capacity())
        for number, unit in enumerate(units):
            transfers.start(number, cargo(machine.load(4096, unit)), 0.0)
        assert arrivals(transfers) == pytest.approx([expected] * 2)


def test_a_crowd_of_long_prompts_waits_for_the_wires_and_the_report_says_so() -> None:
    # One prefill NPU: every prompt of a step leaves through the same two cards.
    scenario = Scenario(prefill_npus=1, prefill_instances=1)
    requests = [Request(0.0, 4096, 20, ()) for _ in range(8)]
    outcome = Simulator(SupernodeMachine(scenario), deployment(scenario)).run(requests)
    handover = summarise(outcome, SupernodeMachine(scenario), scenario)["handover"]
    assert handover["modelled_s"] > 1.5 * handover["idle_path_s"] > 0
    assert all(job.finished_at is not None for job in outcome.jobs)
