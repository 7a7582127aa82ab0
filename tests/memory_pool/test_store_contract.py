"""What every store does, in memory and in Redis alike."""

import os
import threading
from collections.abc import Iterator

import pytest
import xxhash

from memory_pool.redis_store import RedisStore
from memory_pool.store import Buffer, Get, MemoryStore, Put, Store
from memory_pool.target import Checked
from tests.memory_pool.conftest import poll


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    made: Store = (
        MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_url"))
    )
    yield made
    made.close()


def put(number: int, *parts: Buffer, ttl_s: float = 60.0, replace: bool = False) -> Put:
    return Put(key(number), sum(len(part) for part in parts), lambda: parts, ttl_s, replace)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def read(store: Store, number: int, size: int) -> bytes | None:
    buffer = bytearray(size)
    (length,) = store.get_many([Get(key(number), [memoryview(buffer)])])
    return None if length is None else bytes(buffer)


def test_values_come_back_scattered_as_they_were_gathered(store: Store) -> None:
    parts: list[Buffer] = [b"head", bytearray(b"middle"), memoryview(os.urandom(300_000))]
    assert store.put_many([put(1, *parts)]) == [True]
    head, rest = bytearray(7), bytearray(300_003)
    assert (store.get_many([Get(key(1), [memoryview(head), memoryview(rest)])])) == [300_010]
    assert bytes(head + rest) == b"".join(parts)


def test_a_checksum_is_fed_as_the_bytes_arrive(store: Store) -> None:
    value = os.urandom(3_000_000)
    store.put_many([put(1, value)])
    digest = xxhash.xxh3_64(b"what was read before")
    target = memoryview(bytearray(len(value) - 9))
    sides = [memoryview(bytearray(size)) for size in (4, 5)]
    store.get_many([Get(key(1), [sides[0], Checked(target, digest), sides[1]])])
    assert digest.intdigest() == xxhash.xxh3_64_intdigest(value[4:-5])


def test_many_at_once_with_holes_and_wrong_sizes(store: Store) -> None:
    values = [os.urandom(10_000 + i) for i in range(40)]
    store.put_many([put(i, value) for i, value in enumerate(values) if i % 3])
    # Every fifth reader expects one byte too many: it learns the true length, and the others are not disturbed.
    buffers = [bytearray(len(value) + (i % 5 == 0)) for i, value in enumerate(values)]
    lengths = store.get_many([Get(key(i), [memoryview(buffer)]) for i, buffer in enumerate(buffers)])
    for i, value in enumerate(values):
        assert lengths[i] == (len(value) if i % 3 else None)
        if i % 3 and i % 5:
            assert buffers[i] == value


def test_a_value_is_kept_unless_replaced(store: Store) -> None:
    store.put_many([put(1, b"old")])
    assert store.put_many([put(1, b"new")]) == [True]
    assert read(store, 1, 3) == b"old"
    assert store.put_many([put(1, b"new", replace=True)]) == [True]
    assert read(store, 1, 3) == b"new"


def test_count_prefix_stops_at_the_first_hole(store: Store) -> None:
    store.put_many([put(i, b"x") for i in (0, 1, 3)])
    assert store.count_prefix([key(i) for i in range(4)]) == 2
    assert store.count_prefix([key(1), key(3)]) == 2
    assert store.count_prefix([key(2), key(3)]) == 0
    assert store.count_prefix([]) == 0
    assert store.exists([key(i) for i in range(4)]) == [True, True, False, True]
    assert store.exists([]) == []


def test_delete_tells_how_many_there_were(store: Store) -> None:
    store.put_many([put(1, b"x"), put(2, b"x")])
    assert store.delete([key(1), key(5)]) == 1
    assert store.delete([]) == 0
    assert read(store, 1, 1) is None
    assert read(store, 2, 1) == b"x"


def test_a_value_goes_when_its_time_is_over(store: Store) -> None:
    store.put_many([put(1, b"x", ttl_s=0.02), put(2, b"x")])
    poll(lambda: read(store, 1, 1) is None)
    assert store.count_prefix([key(1)]) == 0
    assert read(store, 2, 1) == b"x"


def test_a_held_value_is_not_evicted(store: Store) -> None:
    store.put_many([put(i, b"x") for i in range(4)])
    keys = [key(i) for i in range(4)]
    assert store.lease(keys[:2], "one", 60.0) == 2
    assert store.lease(keys[1:3], "two", 60.0) == 2
    store.release(keys[:2], "one", 60.0)
    # 0 is free again, 1 and 2 are still held by two, 3 never was.
    assert store.evict(keys) == [True, False, False, True]
    store.release(keys[1:3], "two", 60.0)
    assert store.evict(keys) == [False, True, True, False]


def test_a_lease_counts_what_is_there_and_runs_out(store: Store) -> None:
    store.put_many([put(0, b"x"), put(2, b"x")])
    assert store.lease([key(i) for i in range(3)], "one", 0.05) == 1
    assert store.evict([key(0)]) == [False]
    poll(lambda: store.evict([key(0)]) == [True])


def test_a_released_value_has_its_time_to_live_again(store: Store) -> None:
    store.put_many([put(0, b"x", ttl_s=0.05)])
    store.lease([key(0)], "one", 60.0)
    store.release([key(0)], "one", 0.02)
    poll(lambda: store.exists([key(0)]) == [False])


def test_threads_share_a_store(store: Store) -> None:
    wrong: list[int] = []

    def work(thread: int) -> None:
        for turn in range(20):
            value = os.urandom(5000)
            number = thread * 100 + turn
            store.put_many([put(number, value)])
            if read(store, number, 5000) != value:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_full_memory_store_refuses_and_keeps_what_it_has() -> None:
    store = MemoryStore(capacity_bytes=10)
    assert store.put_many([put(1, b"12345678"), put(2, b"123")]) == [True, False]
    store.delete([key(1)])
    assert store.put_many([put(2, b"123")]) == [True]
