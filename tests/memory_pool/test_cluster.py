"""A real Redis Cluster: three masters, each with a replica."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio

from memory_pool.async_client import AsyncPoolClient
from memory_pool.client import PoolClient
from memory_pool.directory import Directory
from memory_pool.disk_tier import DiskTier
from memory_pool.keeper import Integrity, Keeper
from memory_pool.redis_store import AsyncRedisStore
from memory_pool.store import StoreError
from tests.memory_pool.conftest import FORMAT, fetches_of, poll, puts_of, tokens_of
from tests.redis_cluster import Cluster

pytestmark = pytest.mark.slow

VALUE_BYTES = FORMAT.value_bytes(FORMAT.block_tokens)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


async def test_the_pool_works_over_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    puts = [put for first in range(8) for put in puts_of(tokens_of(20, first=1 + 1000 * first), "tenant")]
    keys = [put.key for put in puts[:20]]
    keeper = Keeper(cluster.url, disk=DiskTier(tmp_path, 16 << 20))
    with contextlib.closing(PoolClient(cluster.url, FORMAT)) as client, contextlib.closing(keeper):
        assert all(result.ok for result in client.publish(puts))
        items = fetches_of(puts)
        assert all(result.ok for result in client.fetch(items))
        assert all(put.payload == item.into for put, item in zip(puts, items, strict=True))
        assert client.lookup([*keys, bytes(32)], "tenant") == 20
        assert client.lease(keys, holder="me") == 20
        client.release(keys, holder="me")
        assert client.statistics().namespaces["tenant"].used_bytes == 160 * VALUE_BYTES
        keeper.run_pass()
        assert keeper.audit() == Integrity()
        assert client.delete(keys[:1]) == 1
        assert keeper.audit() == Integrity(vanished=1)
    gateway = AsyncPoolClient(cluster.url)
    assert await gateway.lookup([*keys[1:], bytes(32)], "tenant") == 19
    assert (await gateway.stats())["blocks"] == 159
    await gateway.close()
    with contextlib.closing(Directory(cluster.url)) as directory:
        directory.announce("w", b"record", 60.0)
        assert directory.members() == {"w": b"record"}


def test_the_blocks_spread_over_the_masters(cluster: Cluster) -> None:
    with contextlib.closing(PoolClient(cluster.url, FORMAT)) as client:
        for first in range(20):
            client.publish(puts_of(tokens_of(4, first=50_000 + 100 * first)))
    sizes = []
    for port in cluster.ports[:3]:
        with redis.Redis(port=port) as node:
            sizes.append(len(list(node.scan_iter("cm:b:*"))))
    assert min(sizes) > 0.1 * sum(sizes)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # sockets that redis-py forgets
async def test_a_task_whose_connection_another_closes_sees_a_store_error(cluster: Cluster) -> None:
    draw = random.Random(1)
    failures: list[StoreError] = []

    async def ask(store: AsyncRedisStore) -> None:
        try:
            await store.count_prefix([draw.randbytes(32) for _ in range(3)])
        except StoreError as error:
            failures.append(error)

    async def close_connections(store: AsyncRedisStore) -> None:
        """What redis-py does to all tasks when one of them met a failure."""
        client = store.connection._client
        assert isinstance(client, redis.asyncio.RedisCluster)
        for _ in range(60):
            await asyncio.sleep(draw.random() * 0.002)
            closing = (node.disconnect() for node in client.get_nodes())
            await asyncio.gather(*closing, return_exceptions=True)

    for _ in range(8):
        store = AsyncRedisStore(cluster.url, timeout_s=0.5)
        assert await store.connection.is_cluster()
        await asyncio.gather(close_connections(store), *(ask(store) for _ in range(200)))
        await store.close()
    # Another error than a StoreError would have come out of gather.
    assert failures


def test_a_killed_master_costs_misses_and_nothing_else(cluster: Cluster) -> None:
    puts = [put for first in range(10) for put in puts_of(tokens_of(18, first=200_000 + 1000 * first))]
    wrong: list[int] = []
    outcomes: list[list[bool]] = []
    stop = threading.Event()
    with contextlib.closing(PoolClient(cluster.url, FORMAT)) as client:
        assert all(result.ok for result in client.publish(puts))

        def load() -> None:
            while not stop.is_set():
                items = fetches_of(puts)
                results = client.fetch(items)
                outcomes.append([result.ok for result in results])
                for index, (put, item, result) in enumerate(zip(puts, items, results, strict=True)):
                    if result.ok and put.payload != item.into:
                        wrong.append(index)

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            poll(lambda: len(outcomes) > 5)
            cluster.processes[1].kill()
            killed_at = time.monotonic()
            poll(lambda: not all(outcomes[-1]), within_s=10)
            # The replica takes over; the blocks it holds are served again, without anybody's doing.
            poll(lambda: len(outcomes) > 0 and sum(outcomes[-1]) > 0.95 * len(puts), within_s=60)
            took_s = time.monotonic() - killed_at
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        assert took_s < 30
        assert all(result.ok for result in client.publish(puts))
