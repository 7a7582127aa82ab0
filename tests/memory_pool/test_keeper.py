import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from memory_pool.client import FetchItem, PoolClient, PutItem, Reason
from memory_pool.disk_tier import DiskReader, DiskTier
from memory_pool.eviction import Watermarks
from memory_pool.keeper import Integrity, Keeper
from memory_pool.redis_server import RedisServer
from memory_pool.redis_store import redis_key
from tests.memory_pool.conftest import FORMAT, fetches_of, poll, puts_of, tokens_of

VALUE_BYTES = FORMAT.value_bytes(FORMAT.block_tokens)


@pytest.fixture
def client(redis_url: str, tmp_path: Path) -> Iterator[PoolClient]:
    with contextlib.closing(PoolClient(redis_url, FORMAT, disk=DiskReader(tmp_path))) as made:
        yield made


@pytest.fixture
def keeper(redis_url: str, tmp_path: Path) -> Iterator[Keeper]:
    with contextlib.closing(Keeper(redis_url, disk=DiskTier(tmp_path, 1 << 20))) as made:
        yield made


def same(puts: list[PutItem], items: list[FetchItem]) -> bool:
    return all(put.payload == item.into for put, item in zip(puts, items, strict=True))


def test_blocks_come_back_from_disk_after_dram_lost_them(
    client: PoolClient, keeper: Keeper, redis_url: str
) -> None:
    puts = puts_of(tokens_of(4), "tenant")
    keys = [put.key for put in puts]
    client.publish(puts)
    keeper.run_pass()
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    assert client.lookup(keys, "tenant") == 4
    assert client.lookup(keys, "other") == 0
    items = fetches_of(puts)
    assert all(result.ok for result in client.fetch(items))
    assert same(puts, items)
    # The keeper brings them back to DRAM, charged.
    keeper.run_pass()
    statistics = client.statistics()
    assert statistics.namespaces["tenant"].used_bytes == 4 * VALUE_BYTES
    assert statistics.namespaces["tenant"].disk_hits == 4
    disk = statistics.tiers["disk"]
    assert (disk.blocks, disk.used_bytes, disk.hits) == (4, 4 * VALUE_BYTES, 4)
    with redis.Redis.from_url(redis_url) as connection:
        assert all(connection.exists(redis_key(key)) for key in keys)


def test_a_block_damaged_in_dram_is_read_from_disk(
    client: PoolClient, keeper: Keeper, redis_url: str
) -> None:
    puts = puts_of(tokens_of(1))
    client.publish(puts)
    keeper.run_pass()
    with redis.Redis.from_url(redis_url) as connection:
        connection.setrange(redis_key(puts[0].key), 500, b"damage")
    items = fetches_of(puts)
    assert client.fetch(items)[0].ok
    assert same(puts, items)
    # The copy in DRAM is no use to the next reader either.
    assert client.statistics().as_dict()["damaged"] == 1
    with redis.Redis.from_url(redis_url) as connection:
        assert not connection.exists(redis_key(puts[0].key))


def test_a_file_damaged_on_disk_is_a_miss_and_removed(
    client: PoolClient, keeper: Keeper, tmp_path: Path
) -> None:
    puts = puts_of(tokens_of(2))
    client.publish(puts)
    keeper.run_pass()
    client.delete([put.key for put in puts])
    disk = DiskReader(tmp_path)
    broken = disk.path("default", puts[0].key)
    data = bytearray(broken.read_bytes())
    data[200] ^= 1
    broken.write_bytes(data)
    disk.path("default", puts[1].key).write_bytes(b"short")
    assert {result.reason for result in client.fetch(fetches_of(puts))} == {Reason.ABSENT}
    assert not broken.exists()


def test_a_quota_makes_room_for_the_newest(client: PoolClient, keeper: Keeper) -> None:
    keeper._books.set_quota("default", 20 * VALUE_BYTES)
    client.publish(puts_of(tokens_of(20)))
    keeper.run_pass()
    # 20 of 20 blocks are over the high mark of 18, so room is made down to 85 %: 17 blocks.
    assert client.statistics().namespaces["default"].blocks == 17
    assert client.statistics().namespaces["default"].evictions == 3
    assert all(result.ok for result in client.publish(puts_of(tokens_of(3, first=500))))


def test_what_was_fetched_lately_outlives_what_was_not(client: PoolClient, keeper: Keeper) -> None:
    keeper._books.set_quota("default", 20 * VALUE_BYTES)
    puts = puts_of(tokens_of(20))
    for put in puts:
        client.publish([put])
    assert client.fetch(fetches_of(puts[:2]))[0].ok
    keeper.run_pass()
    # Three go (see above): the oldest that were not read since.
    left = {charge.key for charge in keeper._books.charges("default")}
    assert [put.key in left for put in puts[:6]] == [True, True, False, False, False, True]


def test_a_chain_is_evicted_from_its_end(client: PoolClient, keeper: Keeper) -> None:
    keeper._books.set_quota("default", 20 * VALUE_BYTES)
    puts = puts_of(tokens_of(20))
    client.publish(puts)
    keeper.run_pass()
    left = {charge.key for charge in keeper._books.charges("default")}
    assert [put.key in left for put in puts] == [True] * 17 + [False] * 3


def test_dram_is_evicted_by_watermark_and_held_blocks_stay(own_redis: RedisServer) -> None:
    keeper = Keeper(own_redis.url, watermarks=Watermarks(high=0.5, step=0.1))
    with contextlib.closing(PoolClient(own_redis.url, FORMAT)) as client, contextlib.closing(keeper):
        puts = puts_of(tokens_of(40))
        client.publish(puts)
        keys = [put.key for put in puts]
        assert client.lease(keys[:5], holder="reader") == 5
        with redis.Redis.from_url(own_redis.url) as connection:
            used = connection.info("memory")["used_memory"]
            # The blocks' 60 kB are above what 50 % of this limit leaves beside the server's own memory.
            connection.config_set("maxmemory-policy", "noeviction")
            connection.config_set("maxmemory", int(used * 1.9))
            keeper.run_pass()
            left = [bool(connection.exists(redis_key(key))) for key in keys]
        assert all(left[:5])
        assert sum(left) < 40
        assert keeper.audit() == Integrity()
        client.release(keys[:5], holder="reader")


def test_an_audit_mends_the_books(client: PoolClient, keeper: Keeper, redis_url: str) -> None:
    puts = puts_of(tokens_of(5))
    client.publish(puts)
    assert keeper.audit() == Integrity()
    with redis.Redis.from_url(redis_url) as connection:
        connection.delete(redis_key(puts[0].key))
        connection.set(redis_key(puts[1].key), b"cut")
        # A writer that died between charge and store, long ago; and one that died after storing.
        for put, charge in ((puts[2], f"{VALUE_BYTES} 1 0 1"), (puts[3], f"{VALUE_BYTES} 2 0 1")):
            connection.hset("cm:ns:{default}:charges", put.key, charge)
        connection.delete(redis_key(puts[3].key))
    assert keeper.audit() == Integrity(vanished=1, wrong_size=1, dead_writers=3)
    noted = client.stats()["keeper"]
    assert (noted["audits"], noted["balanced"], noted["last"]["dead_writers"]) == (2, False, 3)
    assert (noted["high_watermark"], noted["watermark_step"]) == (0.9, 0.05)
    # Blocks 2 and 4 are left.
    assert client.statistics().namespaces["default"].used_bytes == 2 * VALUE_BYTES
    assert keeper.audit() == Integrity()
    noted = client.stats()["keeper"]
    assert (noted["balanced"], noted["total"]["dead_writers"]) == (True, 3)


def test_a_reader_that_died_does_not_hold_for_ever(
    client: PoolClient, keeper: Keeper, redis_url: str
) -> None:
    puts = puts_of(tokens_of(1))
    client.publish(puts)
    client.lease([puts[0].key], holder="dead", ttl_s=0.02)
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.ttl(redis_key(puts[0].key)) == -1
        poll(lambda: keeper.audit().expired_leases == 1)
        assert connection.ttl(redis_key(puts[0].key)) > 0


def test_the_process_keeps_house_and_ends_when_told(
    client: PoolClient, redis_url: str, tmp_path: Path
) -> None:
    argv = [sys.executable, "-m", "memory_pool.keeper", "--disk-folder", str(tmp_path)]
    process = subprocess.Popen(
        argv, env=os.environ | {"CLOUDMATRIX_REDIS_URL": redis_url}, stderr=subprocess.DEVNULL
    )
    puts = puts_of(tokens_of(2))
    client.publish(puts)
    poll(lambda: all(DiskReader(tmp_path).contains("default", put.key) for put in puts))
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("variable", "says"), [("1.5", "0 < step <= high <= 1"), ("most", "invalid float value")]
)
def test_bad_watermarks_are_refused(variable: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memory_pool.keeper"],
        env=os.environ
        | {"CLOUDMATRIX_REDIS_URL": "redis://127.0.0.1:1", "CLOUDMATRIX_POOL_HIGH_WATERMARK": variable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
