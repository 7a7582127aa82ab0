import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.cost import line_rate, path_cost, transfer_report, transfer_time
from fabric.planes import Operation
from fabric.topology import SUPERNODE, FabricError, Topology, parse_place


@pytest.mark.parametrize(
    ("src", "dst", "op", "gb_per_s", "latency_us"),
    [  # arXiv 2506.12708 v2, Table 1
        ("die:0", "die:767", "read", 164, 1.9),
        ("die:0", "die:2", "read", 167, 1.2),
        ("die:0", "die:767", "write", 135, 2.1),
        ("die:0", "die:15", "write", 137, 1.3),
        ("cpu:191", "die:0", "read", 147, 1.7),
        ("cpu:0", "die:0", "read", 151, 1.0),
        ("die:0", "cpu:191", "write", 107, 1.9),
        ("die:0", "cpu:3", "write", 110, 1.1),
    ],
)
def test_the_published_ub_table_comes_out(
    src: str, dst: str, op: Operation, gb_per_s: float, latency_us: float
) -> None:
    a, b = parse_place(src), parse_place(dst)
    assert transfer_time(a, b, 512, op=op) == pytest.approx(latency_us * 1e-6)
    seconds = transfer_time(a, b, 2 * 10**9, op=op) - transfer_time(a, b, 10**9, op=op)
    assert 10**9 / seconds == pytest.approx(gb_per_s * 1e9)


def test_handover_of_a_4k_prompt() -> None:
    # DeepSeek-R1: 4,096 tokens x 70,272 B = 287,834,112 B, between packages of two nodes
    report = transfer_report("npu:0", "npu:383", 4096 * 70_272)
    # line rate: 392 GB/s, 400 Gbps, an eighth of 400 Gbps
    assert report["line_rate_s"] == pytest.approx(
        {"ub": 0.734e-3, "roce": 5.757e-3, "vpc": 46.05e-3}, rel=1e-3
    )
    # achieved: two dies at 164 GB/s; two cards of 25 GB/s at 85 %; the VPC's share
    assert report["ub_s"] == pytest.approx(287_834_112 / 328e9 + 1.9e-6, rel=1e-4)
    assert report["roce_s"] == pytest.approx(287_834_112 / 42.5e9 + 5e-6, rel=1e-4)
    assert report["vpc_s"] == pytest.approx(287_834_112 / 6.25e9 + 30e-6, rel=1e-4)
    assert report["path"] == ["die:0", "l1:0.0", "l2:0.0", "l1:47.0", "die:766"]


places = st.one_of(
    st.integers(0, 767).map(lambda i: f"die:{i}"), st.integers(0, 383).map(lambda i: f"npu:{i}"),
    st.integers(0, 191).map(lambda i: f"cpu:{i}"),
)  # fmt: skip


@given(places, places, st.integers(0, 10**10))
def test_ub_beats_roce_beats_vpc_at_every_size(src: str, dst: str, num_bytes: int) -> None:
    a, b = parse_place(src), parse_place(dst)
    if a == b or set(a.dies) & set(b.dies):
        return
    ub, roce, vpc = (transfer_time(a, b, num_bytes, plane) for plane in ("ub", "roce", "vpc"))
    assert 0 < ub < roce < vpc


def test_failures_slow_a_path_by_the_lanes_they_take() -> None:
    a, b = parse_place("die:0"), parse_place("die:767")
    one_subplane_less = path_cost(a, b, "ub", None, SUPERNODE.without("l1:0.3"))
    assert one_subplane_less.bytes_per_s == pytest.approx(164e9 * 6 / 7)
    # 15 of 16 L2 chips of a sub-plane still carry the 28 GB/s of one die
    assert path_cost(a, b, "ub", None, SUPERNODE.without("l2:3.5")).bytes_per_s == pytest.approx(164e9)
    with pytest.raises(FabricError, match="no ub way from die:0 to die:767"):
        path_cost(a, b, "ub", None, SUPERNODE.without(*(f"l1:0.{k}" for k in range(7))))
    with pytest.raises(FabricError, match="no roce way"):
        path_cost(a, b, "roce", None, SUPERNODE.without("nic:767"))


def test_engines_add_their_start_up() -> None:
    a, b = parse_place("die:0"), parse_place("die:767")
    assert transfer_time(a, b, 512, engine="sdma") == pytest.approx(11.9e-6)
    assert transfer_time(a, b, 512, engine="aiv_direct") == pytest.approx(2.9e-6)


def test_a_smaller_supernode_ends_where_it_ends() -> None:
    small = Topology.of_npus(192)
    assert transfer_time(parse_place("npu:0"), parse_place("npu:191"), 512, topology=small) == pytest.approx(
        1.9e-6
    )
    with pytest.raises(FabricError, match="npu:192"):
        transfer_time(parse_place("npu:0"), parse_place("npu:192"), 512, topology=small)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(FabricError, match="num_bytes: -1"):
        transfer_report("npu:0", "npu:1", -1)


@settings(max_examples=25, deadline=None)
@given(
    failed=st.sets(
        st.sampled_from(
            ["l2:0.0", "l2:3.7", "l1:0.2", "l1:47.2", "optic:0.4.1", "optic:47.4.5", "die:0>l1:0.5", "l1:47.6>die:767",
             "l1:0.6>l2:6.3", "l2:6.3>l1:47.6", "die:1>l1:0.5"]
        )
    ),
    ends=st.sampled_from([("npu:0", "npu:383"), ("die:1", "npu:383"), ("cpu:0", "npu:382"), ("npu:0", "cpu:191")]),
)  # fmt: skip
def test_the_rate_between_nodes_is_that_of_all_routes(failed: set[str], ends: tuple[str, str]) -> None:
    # One of sixteen uplinks is left in sub-plane 3, so that it and not the ends sets what passes there.
    dark = {f"l1:0.3>l2:3.{chip}" for chip in range(15)}
    topology = SUPERNODE.without(*failed, *dark)
    src, dst = map(parse_place, ends)
    assert topology.ub_rate_between_nodes(src, dst) == pytest.approx(
        line_rate(topology, topology.routes(src, dst, "ub"))
    )
