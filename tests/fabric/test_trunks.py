import pytest

from fabric.cost import transfer_time
from fabric.matrixlink import MatrixLink
from fabric.sharing import SharedLinks
from fabric.topology import SUPERNODE, FabricError, parse_place
from fabric.trunks import trunk_capacity, trunk_flow

KV_4K = 4096 * 70_272


def seconds(pairs: list[tuple[str, str]], plane: str) -> list[float]:
    """When transfers of 4K tokens of KV that begin together are through, start-up left out."""
    links: SharedLinks[int] = SharedLinks(trunk_capacity())
    for i, (src, dst) in enumerate(pairs):
        links.add(i, trunk_flow(parse_place(src), parse_place(dst), KV_4K, plane), 0.0)
    done = {}
    while (at := links.next_completion_at()) is not None:
        done |= {key: at for at, key in links.advance(at)}
    return [done[i] for i in range(len(pairs))]


def test_trunks_by_hand() -> None:
    capacity = trunk_capacity()
    # 2 dies of 7 lanes of 28 GB/s; 2 cards of 25 GB/s at 85 %; 7 chips of 16 uplinks of 28 GB/s; a CPU's 160 GB/s
    assert capacity["npu:0>ub"] == capacity["ub>npu:383"] == pytest.approx(392e9)
    assert capacity["npu:0>roce"] == capacity["roce>npu:383"] == pytest.approx(42.5e9)
    assert capacity["node:0>l2"] == capacity["l2>node:47"] == pytest.approx(3136e9)
    assert capacity["cpu:191>ub"] == pytest.approx(160e9)
    assert len(capacity) == 4 * 384 + 2 * 192 + 2 * 48


def test_two_handovers_out_of_one_package_take_twice_as_long_on_rdma() -> None:
    alone_s = KV_4K / 42.5e9  # 6.77 ms
    assert seconds([("npu:0", "npu:100")], "roce") == pytest.approx([alone_s])
    assert seconds([("npu:0", "npu:100"), ("npu:0", "npu:200")], "roce") == pytest.approx([2 * alone_s] * 2)
    assert seconds([("npu:0", "npu:200"), ("npu:1", "npu:200")], "roce") == pytest.approx([2 * alone_s] * 2)
    assert seconds([("npu:0", "npu:200"), ("npu:1", "npu:201")], "roce") == pytest.approx([alone_s] * 2)


def test_on_ub_trunks_say_what_every_lane_says() -> None:
    for pairs in (
        [("npu:0", "npu:100")],
        [("npu:0", "npu:100"), ("npu:0", "npu:200")],
        [("npu:0", "npu:200"), ("npu:8", "npu:200")],
        [("npu:0", "npu:1"), ("npu:0", "npu:2")],
    ):
        lanes = MatrixLink()
        for i, (src, dst) in enumerate(pairs):
            lanes.start(str(i), parse_place(src), parse_place(dst), KV_4K, 0.0)
        arrived = {key: at for at, key in lanes.advance(1.0)}
        for i, (at, (src, dst)) in enumerate(zip(seconds(pairs, "ub"), pairs, strict=True)):
            startup_s = transfer_time(parse_place(src), parse_place(dst), 0)
            assert at + startup_s == pytest.approx(arrived[str(i)], rel=1e-6)


def test_what_is_broken_is_missing() -> None:
    broken = SUPERNODE.without("l1:0.0", "nic:2", "nic:4", "nic:5")
    capacity = trunk_capacity(broken)
    assert capacity["node:0>l2"] == pytest.approx(6 / 7 * 3136e9)
    assert capacity["npu:0>ub"] == pytest.approx(6 / 7 * 392e9)
    one_card = trunk_flow(parse_place("npu:1"), parse_place("npu:9"), 1.0, "roce", broken)
    assert capacity[one_card.links[0]] == one_card.limit_bytes_per_s == pytest.approx(21.25e9)
    with pytest.raises(FabricError, match="roce way"):
        trunk_flow(parse_place("npu:2"), parse_place("npu:9"), 1.0, "roce", broken)


def test_inside_a_package_nothing_is_shared() -> None:
    flow = trunk_flow(parse_place("die:0"), parse_place("die:1"), 1.0)
    assert flow.links == ()
    assert flow.limit_bytes_per_s == pytest.approx(210e9)
