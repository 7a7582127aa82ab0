"""A real Redis for the worker tests."""

from collections.abc import Iterator

import pytest
import redis

from memory_pool import redis_server
from memory_pool.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = redis_server.start_redis(tmp_path_factory.mktemp("redis"), maxmemory_bytes=1 << 30)
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_instance: RedisServer) -> str:
    with redis.Redis.from_url(redis_instance.url) as connection:
        connection.flushall()
    return redis_instance.url
