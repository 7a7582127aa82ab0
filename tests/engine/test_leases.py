"""Blocks that are handed over stay in the pool until they were taken over, whatever else is written to it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from engine.protocol import Prefilled
from memory_pool.keys import tag_of
from memory_pool.redis_server import RedisServer, start_redis
from memory_pool.redis_store import RedisStore, lease_key, redis_key
from memory_pool.store import MemoryStore, Store
from tests.engine.fakes import BLOCK_TOKENS, Bench, expected

MIB = 1 << 20
PROMPT = [(i * 7) % 61 for i in range(42)]
"""10 blocks and a tail of 2 tokens."""
OTHER = [(i * 11 + 3) % 61 for i in range(40)]


@pytest.fixture
def small_redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = start_redis(tmp_path, maxmemory_bytes=16 * MIB)
    yield server
    server.stop()


def prefill(store: Store) -> Prefilled:
    bench = Bench(store=store)
    bench.submit("r", PROMPT, phase="prefill")
    bench.finish("r")
    bench.close()
    last = bench.last("r")
    assert isinstance(last, Prefilled)
    return last


def decode(store: Store, prefilled: Prefilled) -> Bench:
    """Decodes what was prefilled, to the end and with all IO over."""
    bench = Bench(store=store)
    first = expected(PROMPT, 1)
    bench.submit("r", PROMPT, phase="decode", generated_tokens=first, handoff=prefilled.handoff)
    bench.finish("r")
    bench.close()
    assert first + bench.tokens("r") == expected(PROMPT, 8)
    return bench


def test_a_handover_is_held_until_it_was_taken() -> None:
    store = MemoryStore()
    prefilled = prefill(store)
    keys = prefilled.handoff.block_keys
    assert len(keys) == 42 // BLOCK_TOKENS
    assert store.evict(keys) == [False] * 10
    decode(store, prefilled)
    assert store.evict(keys) == [True] * 10


def test_a_handover_with_nothing_left_to_fetch_is_let_go_too() -> None:
    store = MemoryStore()
    bench = Bench(store=store)
    bench.submit("r", PROMPT[:33], phase="prefill")
    bench.finish("r")
    handoff = bench.names("r")
    # The same worker decodes: all its blocks are at hand but the tail of one token, which it computes again.
    store.delete([handoff.tail_key or b""])
    bench.submit("r", PROMPT[:33], phase="decode", generated_tokens=expected(PROMPT[:33], 1), handoff=handoff)
    bench.finish("r")
    bench.close()
    assert store.evict(handoff.block_keys) == [True] * 8


def test_what_a_request_read_is_let_go() -> None:
    store = MemoryStore()
    for _ in range(2):
        bench = Bench(store=store)
        bench.submit("r", PROMPT)
        bench.finish("r")
        bench.close()
    assert bench.report("r").cached_tokens == 40  # all whole blocks before the last token
    assert all(store.evict(bench.worker_keys(PROMPT)))


def test_a_handover_outlives_a_full_pool(small_redis: RedisServer) -> None:
    with contextlib.closing(RedisStore(small_redis.url)) as store:
        control = Bench(store=store)
        control.submit("c", OTHER)
        control.finish("c")
        control.close()
        evictable = [redis_key(key) for key in control.worker_keys(OTHER)]
        prefilled = prefill(store)
        with redis.Redis.from_url(small_redis.url) as connection:
            # Redis evicts the oldest of a random sample: 60 MiB through 16 end most blocks, more end the rest.
            for number in range(1000):
                connection.set(f"junk:{number}", bytes(MIB), ex=3600)
                if number >= 60 and not connection.exists(*evictable):
                    break
            else:
                pytest.fail("1 GiB through a pool of 16 MiB left blocks that nobody holds")
        report = decode(store, prefilled).report("r")
        assert report.reuse is not None
        assert report.reuse.fetched_blocks == 10
        assert report.computed_tokens == 0, "the tail was there, too"
        with redis.Redis.from_url(small_redis.url) as connection:
            assert connection.hlen(lease_key(tag_of(prefilled.handoff.tail_key or b""))) == 0
