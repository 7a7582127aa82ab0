import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_manager import BlockManager


def key(number: int) -> bytes:
    return bytes([number])


def test_named_blocks_survive_their_holder() -> None:
    blocks = BlockManager(3, 4)
    a = blocks.allocate(2)
    assert a is not None
    blocks.seal(a[0], key(1))
    blocks.release(a)
    assert (blocks.num_used, blocks.num_idle, blocks.num_available) == (0, 1, 3)
    assert blocks.match([key(1), key(2)]) == [a[0]]
    blocks.hold([a[0]])
    assert blocks.num_used == 1
    blocks.check_integrity([[a[0]]])


def test_allocation_takes_all_or_nothing() -> None:
    blocks = BlockManager(3, 4)
    assert blocks.allocate(2) is not None
    assert blocks.allocate(2) is None
    assert blocks.num_available == 1


def test_the_least_recently_used_idle_block_gives_way_and_the_end_of_a_chain_first() -> None:
    blocks = BlockManager(3, 4)
    chain = blocks.allocate(3)
    assert chain is not None
    for number, block in enumerate(chain):
        blocks.seal(block, key(number))
    blocks.release(chain)
    assert blocks.allocate(1) == [chain[2]]
    assert blocks.match([key(0), key(1), key(2)]) == chain[:2]
    blocks.hold([chain[0]])
    blocks.release([chain[0]])
    assert blocks.allocate(1) == [chain[1]]
    assert blocks.num_evicted == 2


def test_a_name_keeps_its_first_block() -> None:
    blocks = BlockManager(3, 4)
    first, double = blocks.allocate(1) or [], blocks.allocate(1) or []
    blocks.seal(first[0], key(1))
    blocks.seal(double[0], key(1))
    assert blocks.find(key(1)) == first[0]
    blocks.release(double)
    assert blocks.num_idle == 0  # the double was nameless and is free
    blocks.release(first)
    assert blocks.num_idle == 1


def test_room_beside_blocks_that_are_about_to_be_held() -> None:
    blocks = BlockManager(4, 4)
    held = blocks.allocate(2) or []
    for number, block in enumerate(held):
        blocks.seal(block, key(number))
    blocks.release(held[1:])
    # 2 free + 1 idle; holding both named ones takes the idle one out.
    assert blocks.num_available == 3
    assert blocks.num_available_beside(held) == 2


def test_misuse_is_refused() -> None:
    blocks = BlockManager(2, 4)
    with pytest.raises(ValueError, match="block 0 is released"):
        blocks.release([0])
    with pytest.raises(ValueError, match="block 1 is named"):
        blocks.seal(1, key(1))
    with pytest.raises(ValueError, match="must be positive"):
        BlockManager(0, 4)


def test_integrity_check_sees_a_leak() -> None:
    blocks = BlockManager(2, 4)
    held = blocks.allocate(1) or []
    with pytest.raises(AssertionError, match="1 holders in the books, 0 in fact"):
        blocks.check_integrity([])
    blocks.check_integrity([held])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "share", "seal", "drop"]), st.integers(0, 7), st.integers(0, 7)),
        max_size=60,
    )
)
def test_books_balance_whatever_happens(operations: list[tuple[str, int, int]]) -> None:
    blocks = BlockManager(6, 4)
    holders: list[list[int]] = []
    for operation, a, b in operations:
        if operation == "take":
            taken = blocks.allocate(a % 4)
            if taken is not None:
                holders.append(taken)
        elif operation == "share":
            found = blocks.match([key(b)])
            blocks.hold(found)
            holders.append(found)
        elif operation == "seal" and holders and holders[a % len(holders)]:
            blocks.seal(holders[a % len(holders)][0], key(b))
        elif operation == "drop" and holders:
            blocks.release(holders.pop(a % len(holders)))
        blocks.check_integrity(holders)
    for held in holders:
        blocks.release(held)
    assert blocks.num_used == 0
