import pytest

from fabric.topology import L2_PORTS, SUPERNODE, FabricError, Place, Topology, die_of, parse_place


def test_a_whole_supernode_has_the_published_parts() -> None:
    assert (SUPERNODE.num_npus, SUPERNODE.num_dies, SUPERNODE.num_cpus) == (384, 768, 192)
    assert (SUPERNODE.num_compute_racks, SUPERNODE.num_switch_racks) == (12, 4)
    chips = {end for link in SUPERNODE.nominal for end in link.split(">")}
    assert sum(c.startswith("l1:") for c in chips) == 48 * 7
    assert sum(c.startswith("l2:") for c in chips) == 7 * 16


@pytest.mark.parametrize(
    ("npus", "nodes", "switches", "utilisation"),
    [(384, 48, 56, 1.0), (352, 44, 56, 0.92), (288, 36, 42, 1.0), (256, 32, 42, 0.89), (192, 24, 28, 1.0)],
)
def test_switch_count_and_use_follow_table_10(
    npus: int, nodes: int, switches: int, utilisation: float
) -> None:
    topology = Topology.of_npus(npus)
    assert (topology.num_nodes, topology.num_logical_switches) == (nodes, switches)
    assert topology.switch_utilisation == pytest.approx(utilisation, abs=0.005)


@pytest.mark.parametrize("npus", [96, 192, 256, 288, 352, 384])
def test_no_switch_chip_has_more_links_than_ports_and_uplinks_match_the_npus(npus: int) -> None:
    topology = Topology.of_npus(npus)
    into: dict[str, float] = {}
    for link, rate in topology.nominal.items():
        end = link.split(">")[1]
        if end.startswith("l2:"):
            into[end] = into.get(end, 0.0) + rate
    assert max(into.values()) <= L2_PORTS * 28e9
    # 16 links of 28 GB/s from each of 7 L1 chips: 3,136 GB/s, which is 8 NPUs of 392 GB/s
    assert sum(into.values()) == pytest.approx(topology.num_nodes * 8 * 392e9)


def test_routes_between_nodes_are_one_per_subplane_and_l2_chip() -> None:
    routes = SUPERNODE.routes(parse_place("die:0"), parse_place("die:767"))
    assert len(routes) == 7 * 16
    assert routes[0].links == ("die:0>l1:0.0", "l1:0.0>l2:0.0", "l2:0.0>l1:47.0", "l1:47.0>die:767")
    assert len(SUPERNODE.routes(parse_place("die:0"), parse_place("cpu:3"))) == 7
    assert SUPERNODE.routes(parse_place("die:0"), parse_place("die:1"))[0].links == ("die:0>die:1",)


def test_failures_take_their_links_and_nothing_else() -> None:
    def dead(*components: str) -> set[str]:
        return {k for k, v in SUPERNODE.without(*components).capacity.items() if v == 0}

    assert len(dead("l2:3.5")) == 48 * 2
    assert len(dead("l1:7.2")) == 2 * (16 + 4 + 16)
    assert dead("optic:0.3.1") == {"l1:0.3>l2:3.2", "l2:3.2>l1:0.3", "l1:0.3>l2:3.3", "l2:3.3>l1:0.3"}
    assert dead("die:0>l1:0.1") == {"die:0>l1:0.1"}
    assert len(SUPERNODE.without("l2:3.5").routes(parse_place("die:0"), parse_place("die:767"))) == 7 * 16 - 1


def test_an_optical_module_counts_once_however_often_it_is_named() -> None:
    once = SUPERNODE.without("optic:0.3.1").capacity
    assert SUPERNODE.without("optic:0.3.1", "l2:3.2").capacity["l1:0.3>l2:3.3"] == once["l1:0.3>l2:3.3"] == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [("npu:384", "npu:383"), ("die:768", "die:767"), ("cpu:192", "cpu:191"), ("gpu:1", "'gpu:1'"), ("npu:-1", "npu:I"),
     ("npu:x", "'npu:x'"), ("npu", "'npu'"), ("", "''"), ("npu:١", "npu:I")],
)  # fmt: skip
def test_impossible_places_are_named(text: str, named: str) -> None:
    with pytest.raises(FabricError, match=named):
        parse_place(text)


@pytest.mark.parametrize("name", ["l2:9.1", "optic:0.0.8", "optic:1.2", "nic:768", "foo", "die:0>die:5"])
def test_unknown_components_are_named(name: str) -> None:
    with pytest.raises(FabricError, match=name.replace(".", r"\.")):
        SUPERNODE.without(name)


@pytest.mark.parametrize("npus", [0, -8, 4, 385, 392, 10_000])
def test_impossible_sizes_are_refused(npus: int) -> None:
    with pytest.raises(FabricError, match=f"num_npus: {npus}"):
        Topology.of_npus(npus)


@pytest.mark.parametrize(
    ("a", "b"), [("npu:3", "npu:3"), ("npu:0", "die:1"), ("die:1", "npu:0"), ("cpu:1", "cpu:1")]
)
def test_a_place_has_no_way_to_itself(a: str, b: str) -> None:
    with pytest.raises(FabricError, match="same place"):
        SUPERNODE.routes(parse_place(a), parse_place(b))


def test_locations_of_workers_become_dies() -> None:
    assert die_of(0, 0, 0) == Place("die", 0)
    assert die_of(47, 7, 1) == Place("die", 767)
    with pytest.raises(FabricError, match="node=48"):
        die_of(48, 0, 0)
