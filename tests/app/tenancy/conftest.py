"""A real Redis beside the gateways of these tests."""

from collections.abc import Iterator

import pytest

from memory_pool.redis_server import RedisServer, start_redis


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"), maxmemory_bytes=64 << 20)
    yield server
    server.stop()
