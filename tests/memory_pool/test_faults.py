"""Faults under load: whatever happens to Redis, no verb raises, no byte is wrong, and service resumes by itself."""

import contextlib
import os
import random
import threading
from collections import Counter
from pathlib import Path

import redis

from memory_pool.client import PoolClient, Reason
from memory_pool.disk_tier import DiskReader, DiskTier
from memory_pool.keeper import Integrity, Keeper, keep
from memory_pool.redis_server import RedisServer
from tests.memory_pool.conftest import FORMAT, fetches_of, poll, puts_of, tokens_of


class Load:
    """Threads that publish and fetch the same chains over and over, checking every byte that they are given."""

    def __init__(self, url: str, *, disk: DiskReader | None = None) -> None:
        self.client = PoolClient(url, FORMAT, disk=disk)
        self.chains = [puts_of(tokens_of(6, first=1 + 1000 * number)) for number in range(12)]
        self.reasons: Counter[Reason | None] = Counter()
        self.wrong = 0
        self.errors: list[BaseException] = []
        self.rounds = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.client.close()

    def rounds_more(self, number: int) -> None:
        until = self.rounds + number
        poll(lambda: self.rounds >= until or bool(self.errors), within_s=30)

    def _run(self, seed: int) -> None:
        chosen = random.Random(seed)
        try:
            while not self._stop.is_set():
                puts = chosen.choice(self.chains)
                self.client.lookup([put.key for put in puts])
                self.client.publish(puts)
                items = fetches_of(puts)
                results = self.client.fetch(items)
                for put, item, result in zip(puts, items, results, strict=True):
                    self.reasons[result.reason] += 1
                    self.wrong += result.ok and put.payload != item.into
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001  the test reports it
            self.errors.append(error)


def test_killed_flipped_cut_deleted(own_redis: RedisServer) -> None:
    chosen = random.Random(1)
    with Load(own_redis.url) as load:
        load.rounds_more(20)
        for _ in range(2):
            with contextlib.suppress(redis.RedisError), redis.Redis.from_url(own_redis.url) as connection:
                os.kill(connection.info("server")["process_id"], 9)
            served = load.reasons[None]
            poll(lambda served=served: load.reasons[None] > served + 100)  # type: ignore[misc]
        with redis.Redis.from_url(own_redis.url) as connection:
            for turn in range(150):
                name = connection.randomkey()
                if name is None or not name.startswith(b"cm:b:"):
                    continue
                if turn % 3 == 0:
                    connection.setrange(name, chosen.randrange(1000), os.urandom(8))
                elif turn % 3 == 1:
                    value = connection.get(name)
                    if value:
                        connection.set(name, value[: chosen.randrange(len(value))], ex=60)
                else:
                    connection.delete(name)
                if turn % 10 == 0:
                    load.rounds_more(2)
        load.rounds_more(30)
    assert load.errors == []
    assert load.wrong == 0
    assert load.reasons[Reason.UNAVAILABLE] > 0
    assert load.reasons[Reason.CORRUPT] > 0
    assert load.reasons[Reason.TRUNCATED] > 0
    with contextlib.closing(Keeper(own_redis.url)) as keeper:
        keeper.audit()
        assert keeper.audit() == Integrity()


def test_a_keeper_that_comes_and_goes_beside_a_small_full_redis(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    """DRAM holds a third of the blocks; the disk holds all, then breaks, then is back."""
    disk = tmp_path / "disk"
    with redis.Redis.from_url(own_redis.url) as connection:
        connection.config_set("maxmemory", connection.info("memory")["used_memory"] + 400_000)
    with Load(own_redis.url, disk=DiskReader(disk)) as load:
        for turn in range(3):
            stop = threading.Event()
            keeper = Keeper(own_redis.url, disk=DiskTier(disk, 1 << 20))
            thread = threading.Thread(
                target=keep, args=(keeper, stop), kwargs={"pass_s": 0.01, "audit_s": 0.05}
            )
            thread.start()
            load.rounds_more(15)
            stop.set()
            thread.join()
            keeper.close()
            if turn == 0:
                disk.rename(tmp_path / "away")
                disk.write_text("no folder")
            elif turn == 1:
                disk.unlink()
                (tmp_path / "away").rename(disk)
        load.rounds_more(15)
    assert load.errors == []
    assert load.wrong == 0
    assert load.reasons[None] > 100
    with contextlib.closing(Keeper(own_redis.url)) as keeper:
        keeper.audit()
        assert keeper.audit() == Integrity()
