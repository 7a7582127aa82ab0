import pytest

from app.matrix.placement import capacity, place
from engine.protocol import Location, Role


def test_capacity_is_one_worker_a_die() -> None:
    # 12, 20 and 16 nodes of 8 NPUs of 2 dies: 768 dies in all.
    assert (capacity("prefill"), capacity("decode"), capacity("both")) == (192, 320, 256)


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_no_two_workers_share_a_die(role: Role) -> None:
    places = [place(role, index) for index in range(capacity(role))]
    assert len(set(places)) == len(places)
    assert all(0 <= p.node < 48 and 0 <= p.npu < 8 and 0 <= p.die < 2 for p in places)


def test_roles_never_overlap() -> None:
    nodes = [{place(role, i).node for i in range(capacity(role))} for role in ("prefill", "decode", "both")]
    assert sorted(node for area in nodes for node in area) == list(range(48))


def test_nodes_fill_before_npus_and_npus_before_dies() -> None:
    assert place("prefill", 0) == Location(node=0, npu=0, die=0)
    assert place("prefill", 11) == Location(node=11, npu=0, die=0)
    assert place("prefill", 12) == Location(node=0, npu=1, die=0)
    # 12 nodes of 8 NPUs: the 97th worker is the first to share an NPU.
    assert place("prefill", 96) == Location(node=0, npu=0, die=1)


def test_a_full_area_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="320 decode workers"):
        place("decode", 320)
