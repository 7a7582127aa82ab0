import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_pool.eviction import LruIndex, Watermarks
from memory_pool.lease import LeaseTable


def test_watermarks_free_a_step_at_a_time() -> None:
    marks = Watermarks(high=0.9, step=0.05)
    # 90 % of 1000 is 900: nothing to do at 900; at 901 down to 850.
    assert marks.bytes_to_free(900, 1000) == 0
    assert marks.bytes_to_free(901, 1000) == 51
    with pytest.raises(ValueError, match="watermarks"):
        Watermarks(high=0.1, step=0.5)


def test_least_recently_used_go_first_and_held_ones_never() -> None:
    index: LruIndex[str] = LruIndex()
    for name in "abcd":
        index.insert(name, 10)
    index.touch("a")
    index.hold("b", until=5.0)
    # Order of use: b (held), c, d, a. 15 bytes need two blocks.
    assert index.victims(15, now=1.0) == ["c", "d"]
    assert index.victims(15, now=5.0) == ["b", "c"]
    index.hold("b", until=9.0)
    index.hold("b", until=7.0)
    assert index.victims(100, now=8.0) == ["c", "d", "a"]
    index.release("b")
    assert index.victims(1, now=0.0) == ["b"]
    assert index.victims(0, now=0.0) == []


def test_unknown_blocks_are_nothing() -> None:
    index: LruIndex[str] = LruIndex()
    assert not index.touch("a")
    assert index.remove("a") == 0
    index.hold("a", 1.0)
    index.insert("a", 1)
    assert index.victims(1, now=0.0) == ["a"]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 50), st.booleans())))
def test_bytes_are_those_of_the_blocks_inside(steps: list[tuple[str, int, bool]]) -> None:
    index: LruIndex[str] = LruIndex()
    model: dict[str, int] = {}
    for name, size, keep in steps:
        if keep:
            index.insert(name, size)
            model[name] = size
        else:
            assert index.remove(name) == model.pop(name, 0)
    assert index.used_bytes == sum(model.values())
    assert len(index) == len(model)
    assert all(name in index for name in model)


def test_a_block_is_leased_while_anybody_holds_it() -> None:
    table = LeaseTable()
    table.lease(b"k", "one", 10.0)
    table.lease(b"k", "two", 20.0)
    table.release(b"k", "one")
    table.release(b"k", "nobody")
    table.release(b"x", "nobody")
    assert table.is_leased(b"k", 19.0)
    assert not table.is_leased(b"k", 20.0)
    assert not table.is_leased(b"x", 0.0)
    assert table.sweep(19.0) == 0
    assert table.sweep(20.0) == 1
    table.lease(b"k", "two", 5.0)
    assert table.sweep(9.0) == 1
