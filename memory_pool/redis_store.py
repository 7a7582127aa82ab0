"""The store in Redis: one value per block. The only file of the pool that knows Redis (beside `directory.py`).

Values move over own channels (`resp.py`); everything small goes through redis-py. A URL is `redis://`, `rediss://`
(TLS) or `unix://`.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import redis
import redis.asyncio
from redis.connection import parse_url

from memory_pool.keys import TAG_BYTES
from memory_pool.resp import Channel, ChannelError, Endpoint, RefusedError
from memory_pool.store import Get, Put, StoreError

KEY_PREFIX = b"cm:b:"
DEFAULT_TIMEOUT_S = 2.0

_COUNT_PREFIX = """
for i, key in ipairs(KEYS) do
  if redis.call('EXISTS', key) == 0 then return i - 1 end
end
return #KEYS
"""

_EXISTS = """
local present = {}
for i, key in ipairs(KEYS) do present[i] = redis.call('EXISTS', key) end
return present
"""


def redis_key(key: bytes) -> bytes:
    """The Redis key of a block's name: readable, its placement tag as the hash tag of Redis Cluster."""
    return b"%b{%b}%b" % (KEY_PREFIX, key[:TAG_BYTES].hex().encode(), key[TAG_BYTES:].hex().encode())


def endpoint_of(url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Endpoint:
    """Where a Redis URL points. Raises ValueError, which never shows the password, when it is not one."""
    try:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]  # untyped in redis-py
    except ValueError as error:
        raise ValueError("a Redis URL starts with redis://, rediss:// or unix://") from error
    return Endpoint(
        host=options.get("host", "127.0.0.1"),
        port=options.get("port", 6379),
        path=options.get("path"),
        username=options.get("username"),
        password=options.get("password"),
        database=options.get("db", 0),
        timeout_s=timeout_s,
    )


class RedisStore:
    """Blocks in a single Redis server. Thread-safe: each thread at work has a channel of its own."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._endpoint = endpoint_of(url, timeout_s=timeout_s)
        self._redis = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._count_prefix = self._redis.register_script(_COUNT_PREFIX)
        self._exists = self._redis.register_script(_EXISTS)
        self._idle: list[Channel] = []
        self._lock = threading.Lock()

    def get_many(self, gets: Sequence[Get]) -> Iterator[int | None]:
        """See Store."""
        with self._channel() as channel:
            for answer in channel.get_into([redis_key(get.key) for get in gets], [get.into for get in gets]):
                yield None if isinstance(answer, RefusedError) else answer

    def put_many(self, puts: Sequence[Put]) -> list[bool]:
        """See Store."""
        with self._channel() as channel:
            answers = channel.set_from([(redis_key(put.key), put.parts, _set_options(put)) for put in puts])
        return [not isinstance(answer, RefusedError) for answer in answers]

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        if not keys:
            return 0
        with _store_errors():
            return int(cast("int", self._count_prefix(keys=[redis_key(key) for key in keys])))

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See Store."""
        if not keys:
            return []
        with _store_errors():
            answer = cast("list[int]", self._exists(keys=[redis_key(key) for key in keys]))
        return [bool(present) for present in answer]

    def delete(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        if not keys:
            return 0
        with _store_errors():
            return int(self._redis.unlink(*(redis_key(key) for key in keys)))

    def close(self) -> None:
        """See Store."""
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()
        self._redis.close()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Channel]:
        with self._lock:
            channel = self._idle.pop() if self._idle else None
        try:
            channel = channel or Channel(self._endpoint)
            yield channel
        except ChannelError as error:
            if channel is not None:
                channel.close()
            raise StoreError(str(error)) from error
        except BaseException:
            if channel is not None:
                channel.close()
            raise
        with self._lock:
            self._idle.append(channel)


class AsyncRedisStore:
    """What an event loop asks of the store: whether blocks are there. Used from one loop."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        endpoint_of(url)
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
        self._count_prefix = self._redis.register_script(_COUNT_PREFIX)

    async def count_prefix(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        if not keys:
            return 0
        with _store_errors():
            return int(await self._count_prefix(keys=[redis_key(key) for key in keys]))

    async def close(self) -> None:
        """Release connections."""
        await self._redis.aclose()


def _set_options(put: Put) -> list[bytes]:
    options = [b"PX", b"%d" % max(1, round(put.ttl_s * 1000))]
    return options if put.replace else [*options, b"NX"]


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error
