"""Who is alive: members announce themselves in Redis and vanish when they stop doing so.

A record is opaque bytes with a time to live on Redis's own clock; a member announces itself again well before it runs
out. All members of a `group` lie in one hash, so that a glance is one round trip; `group` also keeps services on one
Redis apart.
"""

import contextlib
from collections.abc import Iterator
from typing import cast

import redis
import redis.asyncio

DEFAULT_GROUP = "workers"

_TIMEOUT_S = 2.0

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
_ANNOUNCE = _NOW + "redis.call('HSET', KEYS[1], ARGV[1], struct.pack('<d', now + ARGV[3]) .. ARGV[2])"
_MEMBERS = (
    _NOW
    + """
local found = redis.call('HGETALL', KEYS[1])
local alive = {}
for i = 1, #found, 2 do
  if struct.unpack('<d', found[i + 1]) > now then
    alive[#alive + 1] = found[i]
    alive[#alive + 1] = string.sub(found[i + 1], 9)
  else
    redis.call('HDEL', KEYS[1], found[i])
  end
end
return alive
"""
)


class DirectoryError(Exception):
    """Redis cannot be reached; the last known members are the best guess."""


class Directory:
    """For threads: a worker's side. Every verb raises DirectoryError when Redis cannot be reached."""

    def __init__(self, url: str, *, group: str = DEFAULT_GROUP, timeout_s: float = _TIMEOUT_S) -> None:
        self._key = f"cm:dir:{group}"
        self._redis = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._announce = self._redis.register_script(_ANNOUNCE)
        self._members = self._redis.register_script(_MEMBERS)

    def announce(self, member_id: str, record: bytes, ttl_s: float) -> None:
        """Be a member for the next `ttl_s` seconds."""
        with _directory_errors():
            self._announce(keys=[self._key], args=[member_id, record, round(ttl_s * 1000)])

    def withdraw(self, member_id: str) -> None:
        """Be a member no more."""
        with _directory_errors():
            self._redis.hdel(self._key, member_id)

    def members(self) -> dict[str, bytes]:
        """The records of those alive, by id."""
        with _directory_errors():
            return _by_id(cast("list[bytes]", self._members(keys=[self._key])))

    def close(self) -> None:
        """Release connections."""
        self._redis.close()


class AsyncDirectory:
    """For an event loop: the gateway's side; see Directory."""

    def __init__(self, url: str, *, group: str = DEFAULT_GROUP, timeout_s: float = _TIMEOUT_S) -> None:
        self._key = f"cm:dir:{group}"
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        )
        self._announce = self._redis.register_script(_ANNOUNCE)
        self._members = self._redis.register_script(_MEMBERS)

    async def announce(self, member_id: str, record: bytes, ttl_s: float) -> None:
        """See Directory."""
        with _directory_errors():
            await self._announce(keys=[self._key], args=[member_id, record, round(ttl_s * 1000)])

    async def withdraw(self, member_id: str) -> None:
        """See Directory."""
        with _directory_errors():
            await self._redis.hdel(self._key, member_id)

    async def members(self) -> dict[str, bytes]:
        """See Directory."""
        with _directory_errors():
            return _by_id(await self._members(keys=[self._key]))

    async def close(self) -> None:
        """Release connections."""
        await self._redis.aclose()


def _by_id(flat: list[bytes]) -> dict[str, bytes]:
    return {member_id.decode(): record for member_id, record in zip(flat[::2], flat[1::2], strict=True)}


@contextlib.contextmanager
def _directory_errors() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise DirectoryError(f"{type(error).__name__}: {error}") from error
