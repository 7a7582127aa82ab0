"""A real Redis for the room's tests, and blocks of a small model."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from memory_pool import redis_server
from memory_pool.block import BlockFormat
from memory_pool.client import FetchItem, PutItem
from memory_pool.keys import block_keys
from memory_pool.redis_server import RedisServer

FORMAT = BlockFormat(
    fingerprint="model-a", num_layers=2, num_kv_heads=3, head_dim=16, block_tokens=4, payload_bytes=1536
)


def tokens_of(num_blocks: int, *, first: int = 1) -> list[int]:
    return list(range(first, first + num_blocks * FORMAT.block_tokens))


def keys_of(tokens: list[int], namespace: str = "default") -> list[bytes]:
    return block_keys(
        tokens, block_tokens=FORMAT.block_tokens, fingerprint=FORMAT.fingerprint, namespace=namespace
    )


def puts_of(tokens: list[int], namespace: str = "default") -> list[PutItem]:
    step = FORMAT.block_tokens
    return [
        PutItem(
            key,
            tokens[i * step : (i + 1) * step],
            memoryview(os.urandom(FORMAT.payload_bytes)),
            None,
            namespace,
        )
        for i, key in enumerate(keys_of(tokens, namespace))
    ]


def fetches_of(puts: list[PutItem]) -> list[FetchItem]:
    return [
        FetchItem(put.key, put.tokens, memoryview(np.zeros(FORMAT.payload_bytes, np.uint8)), put.namespace)  # type: ignore[arg-type]
        for put in puts
    ]


def poll(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def redis_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = redis_server.start_redis(tmp_path_factory.mktemp("data"), maxmemory_bytes=256 << 20)
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_instance: RedisServer) -> str:
    with redis.Redis.from_url(redis_instance.url) as connection:
        connection.flushall()
    return redis_instance.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """For tests that break it."""
    server = redis_server.start_redis(tmp_path, maxmemory_bytes=64 << 20)
    yield server
    server.stop()
