import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.cost import transfer_time
from fabric.matrixlink import MatrixLink, seconds_beside, stripes
from fabric.topology import SUPERNODE, FabricError, Place, Topology, parse_place

A, B, C = parse_place("die:0"), parse_place("die:32"), parse_place("die:48")
MB = 10**6


def test_a_transfer_alone_takes_what_the_cost_model_says() -> None:
    for src, dst in (("npu:0", "npu:383"), ("cpu:9", "die:0"), ("die:3", "die:2"), ("die:0", "cpu:100")):
        link = MatrixLink()
        link.start("t", parse_place(src), parse_place(dst), 100 * MB, 1.0)
        expected = 1.0 + transfer_time(parse_place(src), parse_place(dst), 100 * MB)
        assert link.advance(2.0) == [(pytest.approx(expected, abs=1e-12), "t")]


def test_two_readers_of_one_die_share_its_seven_lanes() -> None:
    # 196 GB/s leave the die; each reader could take 164; together 98 GB/s each: 100 MB take 1.0204 ms
    link = MatrixLink()
    link.start("b", A, B, 100 * MB, 0.0, op="read")
    link.start("c", A, C, 100 * MB, 0.0, op="read")
    arrived = {name: at for at, name in link.advance(1.0)}
    assert arrived["b"] == pytest.approx(100e6 / 98e9 + 1.9e-6 - 512 / 164e9)
    assert arrived["c"] == pytest.approx(arrived["b"])


def test_expert_traffic_goes_first() -> None:
    # on each full lane the weights are 16 : 1
    link = MatrixLink()
    link.start("expert", A, B, 100 * MB, 0.0, qos="expert")
    link.start("bulk", A, C, 100 * MB, 0.0, qos="bulk")
    (first, name), (second, _) = link.advance(1.0)
    assert name == "expert"
    # the expert flow is held by its own 164 GB/s, below 16/17 of 196
    assert first == pytest.approx(transfer_time(A, B, 100 * MB))
    # until then bulk has 32 GB/s, after that its own 164
    left = 100e6 - 32e9 * (100e6 / 164e9)
    assert second == pytest.approx(100e6 / 164e9 + left / 164e9 + 1.9e-6 - 512 / 164e9)


def test_stripes_avoid_what_is_broken() -> None:
    used = {flow.links[1].split(">")[1] for flow in stripes(A, B, 1, topology=SUPERNODE)}
    assert len(used) == 7
    broken = used.pop()
    again = {flow.links[1].split(">")[1] for flow in stripes(A, B, 1, topology=SUPERNODE.without(broken))}
    assert broken not in again
    assert len(again) == 7


def test_a_chip_that_breaks_midway_sends_the_rest_over_six_subplanes() -> None:
    # 164 MB at 164 GB/s: half is through at 0.5 ms; six of seven lanes carry the other 82 MB at 164 x 6/7 GB/s
    link = MatrixLink()
    link.start("t", A, B, 164 * MB, 0.0)
    assert link.fail(0.5e-3, "l1:0.3") == []
    ((at, _),) = link.advance(1.0)
    assert at == pytest.approx(0.5e-3 + 82e6 / (164e9 * 6 / 7) + 1.9e-6 - 512 / 164e9)


def test_a_transfer_without_any_way_left_is_reported_lost_and_repair_brings_new_ones_back() -> None:
    link = MatrixLink()
    link.start("t", A, B, 164 * MB, 0.0)
    chips = [f"l1:0.{k}" for k in range(7)]
    assert link.fail(0.1e-3, *chips) == ["t"]
    with pytest.raises(FabricError, match="no ub way"):
        link.start("u", A, B, 1, 0.2e-3)
    link.repair(0.3e-3, *chips)
    link.start("u", A, B, 512, 0.3e-3)
    assert link.advance(1.0) == [(pytest.approx(0.3e-3 + 1.9e-6), "u")]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 31), st.integers(0, 31), st.integers(1, 10**8)), min_size=1, max_size=12
    ),
    st.sets(st.sampled_from(["l1:0.0", "l1:1.4", "l2:2.3", "optic:0.5.1"])),
)
def test_no_ub_link_is_ever_above_its_rate(ends: list[tuple[int, int, int]], broken: set[str]) -> None:
    link = MatrixLink(Topology(2))
    for i, (a, b, num_bytes) in enumerate(ends):
        if a != b:
            link.start(str(i), Place("die", a), Place("die", b), num_bytes, i * 1e-5)
    at = len(ends) * 1e-5
    link.fail(at, *broken)
    while True:
        for name, rate in link.links.link_rates().items():
            assert rate <= link.topology.capacity[name] * (1 + 1e-9)
        next_at = link.next_event_at()
        if next_at is None:
            break
        link.advance(next_at)


def test_transfers_beside_one_another_by_hand() -> None:
    ends = [parse_place(f"npu:{i}") for i in (0, 100, 200)]
    pair = [(ends[0], ends[1], 392 * 10**6), (ends[0], ends[2], 392 * 10**6)]
    startup_s = transfer_time(ends[0], ends[1], 0)
    # one alone is held by what its dies read (328 GB/s); two share the 14 lanes of 28 GB/s: 196 GB/s each
    assert seconds_beside(pair[:1], ["cache"]) == pytest.approx([392e6 / 328e9 + startup_s])
    assert seconds_beside(pair, ["cache", "cache"]) == pytest.approx([2e-3 + startup_s] * 2)
    # 4 to 1: 313.6 GB/s and 78.4; the first is through at 1.25 ms, the other has 294 MB left and goes on at 328 GB/s
    first, second = seconds_beside(pair, ["cache", "bulk"])
    assert first == pytest.approx(1.25e-3 + startup_s)
    assert second == pytest.approx(1.25e-3 + 294e6 / 328e9 + startup_s)
