import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from memory_pool.async_client import AsyncPoolClient
from memory_pool.books import Books
from memory_pool.client import PoolClient, Reason
from memory_pool.connection import Connection
from memory_pool.contents import Contents
from memory_pool.keys import content_keys
from memory_pool.redis_store import redis_key
from tests.memory_pool.conftest import FORMAT, fetches_of, keys_of, puts_of, tokens_of

VALUE_BYTES = FORMAT.value_bytes(FORMAT.block_tokens)


@pytest.fixture
def client(redis_url: str) -> Iterator[PoolClient]:
    with contextlib.closing(PoolClient(redis_url, FORMAT)) as made:
        yield made


@pytest.fixture
def books(redis_url: str) -> Iterator[Books]:
    with contextlib.closing(Connection(redis_url)) as connection:
        yield Books(connection)


def contents_of(tokens: list[int]) -> list[bytes]:
    return content_keys(tokens, block_tokens=FORMAT.block_tokens, fingerprint=FORMAT.fingerprint)


def stored_bytes(url: str) -> int:
    with redis.Redis.from_url(url) as connection:
        return sum(connection.strlen(name) for name in connection.scan_iter("cm:b:*"))


def test_what_is_stored_is_charged(client: PoolClient, redis_url: str) -> None:
    client.publish(puts_of(tokens_of(3), "a"))
    client.publish(puts_of(tokens_of(2), "b"))
    charged = {name: (each.blocks, each.used_bytes) for name, each in client.statistics().namespaces.items()}
    assert charged == {"a": (3, 3 * VALUE_BYTES), "b": (2, 2 * VALUE_BYTES)}
    assert stored_bytes(redis_url) == 5 * VALUE_BYTES


def test_a_quota_admits_what_fits(client: PoolClient, books: Books, redis_url: str) -> None:
    books.set_quota("default", 2 * VALUE_BYTES + 1)
    results = client.publish(puts_of(tokens_of(4)))
    assert [result.reason for result in results] == [None, None, Reason.OVER_QUOTA, Reason.OVER_QUOTA]
    assert client.statistics().namespaces["default"].used_bytes == 2 * VALUE_BYTES == stored_bytes(redis_url)
    books.set_quota("default", None)
    assert all(result.ok for result in client.publish(puts_of(tokens_of(4, first=100))))


def test_fifty_writers_hold_the_quota_to_the_byte(books: Books, redis_url: str) -> None:
    # 50 writers of 4 blocks each, every second pair writing the same ones; room for 61 blocks and some bytes.
    books.set_quota("default", 61 * VALUE_BYTES + 17)
    barrier = threading.Barrier(50)
    over: list[int] = []

    def work(number: int) -> None:
        with contextlib.closing(PoolClient(redis_url, FORMAT)) as client:
            barrier.wait()
            client.publish(puts_of(tokens_of(4, first=1 + 1000 * (number // 2))))
            over.append(client.statistics().namespaces["default"].used_bytes)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(over) <= 61 * VALUE_BYTES + 17
    # 25 different sets of 4 blocks want room for 100: the quota is used as far as whole blocks go.
    assert stored_bytes(redis_url) == 61 * VALUE_BYTES
    assert books.statistics().namespaces["default"].used_bytes == 61 * VALUE_BYTES


def test_a_failed_writer_leaves_the_charge_of_the_other(books: Books) -> None:
    key = bytes(32)
    assert books.admit("n", [(key, 100)]) == [1]
    assert books.admit("n", [(key, 100)]) == [1]
    books.settle("n", {key: False})
    assert books.statistics().namespaces["n"].used_bytes == 100
    books.settle("n", {key: True})
    assert books.statistics().namespaces["n"].used_bytes == 100
    assert books.admit("n", [(key, 100)]) == [2]
    assert books.admit("n", [(key, 100)], also_stored=True) == [1]
    books.settle("n", {key: False})
    assert books.statistics().namespaces["n"].used_bytes == 0
    assert books.settle("n", {key: True}) == [key]


def test_a_block_that_vanished_is_stored_again_and_charged_once(client: PoolClient, redis_url: str) -> None:
    puts = puts_of(tokens_of(2))
    client.publish(puts)
    with redis.Redis.from_url(redis_url) as connection:
        connection.delete(redis_key(puts[0].key))
    assert client.look([puts[0].key]).miss_reason == "evicted"
    assert [result.num_bytes for result in client.publish(puts)] == [VALUE_BYTES, 0]
    assert client.statistics().namespaces["default"].used_bytes == 2 * VALUE_BYTES


def test_lookups_are_counted_and_misses_explained(client: PoolClient, books: Books) -> None:
    puts = puts_of(tokens_of(4))
    keys = [put.key for put in puts]
    assert client.look(keys).miss_reason == "never_seen"
    client.publish(puts[:3])
    look = client.look(keys)
    assert (look.num_blocks, look.miss_reason) == (3, "never_seen")
    assert client.look(keys[:3]).miss_reason is None
    client.delete(keys[:1])
    books.forget("default", "evicted", {charge.key: charge.raw for charge in books.charges("default")[:3]})
    client.delete(keys[:3])
    assert client.look(keys).miss_reason == "evicted"
    client.fetch(fetches_of(puts))
    statistics = client.statistics().namespaces["default"]
    # Queries 4 + 4 + 3 + 4 blocks; hits 0 + 3 + 3 + 0.
    assert (statistics.queries, statistics.hits) == (15, 6)
    assert statistics.misses == {"never_seen": 2, "evicted": 1}
    assert statistics.evictions == 3


def test_an_entry_somebody_changed_is_not_forgotten(client: PoolClient, books: Books) -> None:
    puts = puts_of(tokens_of(1))
    client.publish(puts)
    (before,) = books.charges("default")
    books.admit("default", [(puts[0].key, VALUE_BYTES)], also_stored=True)
    assert books.forget("default", "evicted", {before.key: before.raw}) == 0
    assert books.forget("default", "damaged", {before.key: b""}) == 0


def test_a_strange_namespace_is_refused(books: Books) -> None:
    with pytest.raises(ValueError, match="namespace"):
        books.set_quota("a}b", 1)
    with pytest.raises(ValueError, match="quota_bytes"):
        books.set_quota("a", -1)


async def test_the_gateway_reads_the_same_statistics(client: PoolClient, redis_url: str) -> None:
    client.publish(puts_of(tokens_of(3)))
    gateway = AsyncPoolClient(redis_url)
    seen = await gateway.stats()
    assert seen["namespaces"] == client.stats()["namespaces"]
    assert (seen["available"], seen["blocks"], seen["bytes"]) == (True, 3, 3 * VALUE_BYTES)
    assert seen["tiers"]["dram"]["capacity_bytes"] == 256 << 20
    await gateway.close()
    assert not (await AsyncPoolClient("redis://127.0.0.1:1").stats())["available"]


def test_a_block_that_only_others_have_is_told_from_one_that_nobody_has(
    client: PoolClient, redis_url: str
) -> None:
    tokens = tokens_of(3)
    contents = contents_of(tokens)
    client.publish(
        [replace(put, content=content) for put, content in zip(puts_of(tokens, "a"), contents, strict=True)]
    )
    asked = client.look(keys_of(tokens, "b"), "b", contents=contents)
    assert (asked.num_blocks, asked.miss_reason) == (0, "other_namespace")
    fresh = tokens_of(3, first=500)
    assert client.look(keys_of(fresh, "b"), "b", contents=contents_of(fresh)).miss_reason == "never_seen"
    misses = client.statistics().namespaces["b"].misses
    assert {reason: count for reason, count in misses.items() if count} == {
        "never_seen": 1,
        "other_namespace": 1,
    }
    with redis.Redis.from_url(redis_url) as connection:
        kept = connection.zrange("cm:contents", 0, -1)
    assert {len(each) for each in kept} == {8}
    # What is kept says nothing without the secret: it is not a part of any name.
    assert not any(each in content for each in kept for content in contents)


def test_contents_are_known_after_a_redis_that_came_up_empty(redis_url: str) -> None:
    with contextlib.closing(Connection(redis_url)) as one, contextlib.closing(Connection(redis_url)) as two:
        old, new = Contents(one), Contents(two)
        old.note([b"before"])
        one.call("FLUSHALL")
        old.note([b"after"])
        assert new.knows(b"after")
        assert not new.knows(b"before")
