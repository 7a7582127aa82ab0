import contextlib
import os
from collections.abc import Iterator

import pytest
import redis

from memory_pool.async_client import AsyncPoolClient
from memory_pool.client import FetchItem, PoolClient, PutItem, Reason
from memory_pool.keys import tail_key
from memory_pool.redis_server import RedisServer
from memory_pool.redis_store import redis_key
from tests.memory_pool.conftest import FORMAT, fetches_of, keys_of, poll, puts_of, tokens_of


@pytest.fixture
def client(redis_url: str) -> Iterator[PoolClient]:
    with contextlib.closing(PoolClient(redis_url, FORMAT)) as made:
        yield made


def test_published_blocks_are_found_and_fetched(client: PoolClient) -> None:
    puts = puts_of(tokens_of(5))
    keys = [put.key for put in puts]
    assert client.lookup(keys) == 0
    results = client.publish(puts[:3])
    # A value is the header (118 bytes and 4 per token, 4 tokens) and the payload.
    assert [(r.ok, r.num_bytes) for r in results] == [(True, FORMAT.value_bytes(4))] * 3
    assert client.lookup(keys) == 3
    items = fetches_of(puts)
    fetched = client.fetch(items)
    assert [r.ok for r in fetched] == [True] * 3 + [False] * 2
    assert {r.reason for r in fetched[3:]} == {Reason.ABSENT}
    for put, item in zip(puts[:3], items[:3], strict=True):
        assert item.into == put.payload


def test_a_block_already_there_is_not_sent_again(client: PoolClient) -> None:
    puts = puts_of(tokens_of(3))
    client.publish(puts[:2])
    assert [r.num_bytes > 0 for r in client.publish(puts)] == [False, False, True]


def test_a_tail_holds_fewer_tokens_and_replaces_an_older_one(client: PoolClient) -> None:
    key = tail_key("request-1", "default")
    for tokens in ([7], [7, 8, 9]):
        payload = memoryview(os.urandom(FORMAT.payload_bytes))
        assert client.publish([PutItem(key, tokens, payload, ttl_s=60.0)])[0].ok
        into = memoryview(bytearray(FORMAT.payload_bytes))
        assert client.fetch([FetchItem(key, tokens, into)])[0].ok
        assert into == payload


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda value: value[:-1] + bytes([value[-1] ^ 1]), Reason.CORRUPT),
        (lambda value: b"\x00" + value[1:], Reason.CORRUPT),
        (lambda value: value[:-1], Reason.TRUNCATED),
        (lambda value: b"", Reason.TRUNCATED),
        (lambda value: value + b"x", Reason.TRUNCATED),
        (lambda value: value[:110] + b"\x07" + value[111:], Reason.FOREIGN),
    ],
)
def test_a_damaged_block_is_a_miss_deleted_and_counted(
    client: PoolClient, redis_url: str, change: object, reason: Reason
) -> None:
    puts = puts_of(tokens_of(3))
    client.publish(puts)
    with redis.Redis.from_url(redis_url) as connection:
        name = redis_key(puts[1].key)
        value = connection.get(name)
        connection.set(name, change(value))  # type: ignore[operator]
    results = client.fetch(fetches_of(puts))
    assert [r.reason for r in results] == [None, reason, None]
    assert client.lookup([puts[1].key]) == 0
    assert client.statistics().namespaces["default"].damaged == 1
    assert client.look([puts[1].key]).miss_reason == "damaged"
    assert [r.num_bytes > 0 for r in client.publish(puts)] == [False, True, False]


def test_another_namespace_finds_nothing(client: PoolClient) -> None:
    tokens = tokens_of(2)
    client.publish(puts_of(tokens, "tenant-a"))
    assert client.lookup(keys_of(tokens, "tenant-a")) == 2
    assert client.lookup(keys_of(tokens, "tenant-b")) == 0


def test_an_outage_is_a_miss_and_ends_by_itself(own_redis: RedisServer) -> None:
    client = PoolClient(own_redis.url, FORMAT)
    puts = puts_of(tokens_of(2))
    assert client.publish(puts)[0].ok
    with redis.Redis.from_url(own_redis.url) as connection:
        pid = connection.info("server")["process_id"]
        os.kill(pid, 9)
    assert client.lookup([put.key for put in puts]) == 0
    assert {r.reason for r in client.fetch(fetches_of(puts))} == {Reason.UNAVAILABLE}
    assert {r.reason for r in client.publish(puts)} == {Reason.UNAVAILABLE}
    poll(lambda: client.publish(puts)[0].ok)
    assert client.lookup([put.key for put in puts]) == 2
    client.close()


def test_a_full_pool_drops_the_publish(client: PoolClient, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        limit = connection.config_get("maxmemory")["maxmemory"]
        connection.config_set("maxmemory-policy", "noeviction")
        connection.config_set("maxmemory", "1")
        try:
            assert {r.reason for r in client.publish(puts_of(tokens_of(2)))} == {Reason.FULL}
        finally:
            connection.config_set("maxmemory", limit)
            connection.config_set("maxmemory-policy", "volatile-lru")
    assert client.publish(puts_of(tokens_of(2)))[0].ok


async def test_the_gateway_sees_the_same_prefix(client: PoolClient, redis_url: str) -> None:
    puts = puts_of(tokens_of(4))
    client.publish(puts[:2])
    gateway = AsyncPoolClient(redis_url)
    assert await gateway.lookup([put.key for put in puts]) == 2
    assert await gateway.lookup([]) == 0
    await gateway.close()


async def test_the_gateway_survives_an_outage() -> None:
    gateway = AsyncPoolClient("redis://127.0.0.1:1/0")
    assert await gateway.lookup([bytes(32)]) == 0
    await gateway.close()


def test_a_block_lies_on_one_cpu_of_the_supernode(client: PoolClient) -> None:
    places = [client.place_of(key) for key in keys_of(tokens_of(200))]
    assert all(0 <= int(place.removeprefix("cpu:")) < 192 for place in places)
    assert len(set(places)) > 5
    # Blocks 2 to 17 are one segment.
    assert len(set(places[2:18])) == 1
