import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.sharing import Flow, SharedLinks, max_min_rates


def test_two_flows_on_one_link() -> None:
    # 100 B/s shared evenly: at 2 s the 100 B are through and 200 B of the 300 are left, which take 2 s more
    links: SharedLinks[str] = SharedLinks({"x": 100.0})
    links.add("a", Flow(("x",), 100), 0.0)
    links.add("b", Flow(("x",), 300), 0.0)
    assert links.next_completion_at() == pytest.approx(2.0)
    assert links.advance(10.0) == [(pytest.approx(2.0), "a"), (pytest.approx(4.0), "b")]
    assert links.carried["x"] == pytest.approx(400)


def test_a_late_flow_slows_the_first() -> None:
    # alone until 1 s: 100 of 200 B; then 50 B/s each: the other 100 B end at 3 s; b has 50 B left, 0.5 s alone
    links: SharedLinks[str] = SharedLinks({"x": 100.0})
    links.add("a", Flow(("x",), 200), 0.0)
    links.add("b", Flow(("x",), 150), 1.0)
    assert links.advance(5.0) == [(pytest.approx(3.0), "a"), (pytest.approx(3.5), "b")]


def test_the_textbook_line() -> None:
    # a crosses x (10) and y (4); b uses x; c uses y. y is fullest: 2 each; b takes what is left of x: 8
    rates = max_min_rates([Flow(("x", "y"), 1), Flow(("x",), 1), Flow(("y",), 1)], {"x": 10.0, "y": 4.0})
    assert rates == pytest.approx([2, 8, 2])


def test_weights_and_limits() -> None:
    # weights 3:1 on 100, but the heavy one can only move 30: the rest goes to the light one
    assert max_min_rates([Flow(("x",), 1, 3.0), Flow(("x",), 1)], {"x": 100.0}) == pytest.approx([75, 25])
    assert max_min_rates([Flow(("x",), 1, 3.0, 30.0), Flow(("x",), 1)], {"x": 100.0}) == pytest.approx(
        [30, 70]
    )


def test_a_dead_link_stops_its_flows_until_it_is_back() -> None:
    links: SharedLinks[str] = SharedLinks({"x": 100.0})
    links.add("a", Flow(("x",), 100), 0.0)
    links.set_capacity("x", 0.0, 0.5)
    assert links.next_completion_at() is None
    links.set_capacity("x", 50.0, 2.0)
    assert links.next_completion_at() == pytest.approx(3.0)


def test_misuse_is_refused() -> None:
    links: SharedLinks[str] = SharedLinks({"x": 100.0}, now=1.0)
    with pytest.raises(ValueError, match="time went back"):
        links.advance(0.5)
    links.add("a", Flow(("x",), 1), 1.0)
    with pytest.raises(ValueError, match="'a' is already"):
        links.add("a", Flow(("x",), 1), 1.0)
    with pytest.raises(ValueError, match="neither links nor a limit"):
        max_min_rates([Flow((), 1)], {})


names = st.sampled_from(["p", "q", "r", "s", "t"])
flows = st.builds(
    Flow,
    st.lists(names, min_size=1, max_size=4).map(tuple),
    st.floats(1, 1e9),
    st.floats(0.1, 20),
    st.none() | st.floats(0, 1e6),
)
capacities = st.fixed_dictionaries({name: st.floats(0, 1e6) for name in "pqrst"})


@given(st.lists(flows, max_size=12), capacities)
def test_no_link_is_ever_above_its_rate_and_every_flow_is_held_by_something(
    some: list[Flow], capacity: dict[str, float]
) -> None:
    rates = max_min_rates(some, capacity)
    load = dict.fromkeys(capacity, 0.0)
    for flow, rate in zip(some, rates, strict=True):
        assert rate >= 0
        for link in set(flow.links):
            load[link] += rate
    for link, total in load.items():
        assert total <= capacity[link] * (1 + 1e-9) + 1e-9
    for flow, rate in zip(some, rates, strict=True):
        at_limit = flow.limit_bytes_per_s is not None and rate >= flow.limit_bytes_per_s * (1 - 1e-6) - 1e-6
        full = any(load[link] >= capacity[link] * (1 - 1e-6) - 1e-6 for link in flow.links)
        assert at_limit or full


@given(st.lists(st.tuples(flows, st.floats(0, 100)), min_size=1, max_size=8), capacities)
def test_bytes_carried_never_exceed_rate_times_time(
    some: list[tuple[Flow, float]], capacity: dict[str, float]
) -> None:
    links: SharedLinks[int] = SharedLinks(capacity)
    for i, (flow, at) in enumerate(sorted(some, key=lambda item: item[1])):
        links.add(i, flow, at)
    links.advance(200.0)
    for link, carried in links.carried.items():
        crossings = max(flow.links.count(link) for flow, _ in some)
        assert carried <= capacity[link] * 200.0 * max(1, crossings) * (1 + 1e-9) + 1e-6
