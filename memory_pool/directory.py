"""Who is alive: members announce themselves in Redis and vanish when they stop doing so.

A record is opaque bytes with a time to live on Redis's own clock; a member announces itself again well before it runs
out. All members of a `group` lie in one hash, so that a glance is one round trip; `group` also keeps services on one
Redis apart.
"""

import contextlib
from collections.abc import Iterator

from memory_pool import scripts
from memory_pool.connection import DEFAULT_TIMEOUT_S, AsyncConnection, Connection
from memory_pool.store import StoreError

DEFAULT_GROUP = "workers"


class DirectoryError(Exception):
    """Redis cannot be reached; the last known members are the best guess."""


class Directory:
    """For threads: a worker's side. Every verb raises DirectoryError when Redis cannot be reached."""

    def __init__(self, url: str, *, group: str = DEFAULT_GROUP, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._key = f"cm:dir:{group}"
        self._connection = Connection(url, timeout_s=timeout_s)

    def announce(self, member_id: str, record: bytes, ttl_s: float) -> None:
        """Be a member for the next `ttl_s` seconds."""
        with _directory_errors():
            self._connection.run(scripts.ANNOUNCE, [self._key], [member_id, record, round(ttl_s * 1000)])

    def withdraw(self, member_id: str) -> None:
        """Be a member no more."""
        with _directory_errors():
            self._connection.call("HDEL", self._key, member_id)

    def members(self) -> dict[str, bytes]:
        """The records of those alive, by id."""
        with _directory_errors():
            return _by_id(self._connection.run(scripts.MEMBERS, [self._key]))

    def close(self) -> None:
        """Release connections."""
        self._connection.close()


class AsyncDirectory:
    """For an event loop: the gateway's side; see Directory."""

    def __init__(self, url: str, *, group: str = DEFAULT_GROUP, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._key = f"cm:dir:{group}"
        self._connection = AsyncConnection(url, timeout_s=timeout_s)

    async def announce(self, member_id: str, record: bytes, ttl_s: float) -> None:
        """See Directory."""
        with _directory_errors():
            await self._connection.run(
                scripts.ANNOUNCE, [self._key], [member_id, record, round(ttl_s * 1000)]
            )

    async def withdraw(self, member_id: str) -> None:
        """See Directory."""
        with _directory_errors():
            await self._connection.call("HDEL", self._key, member_id)

    async def members(self) -> dict[str, bytes]:
        """See Directory."""
        with _directory_errors():
            return _by_id(await self._connection.run(scripts.MEMBERS, [self._key]))

    async def close(self) -> None:
        """Release connections."""
        await self._connection.close()


def _by_id(flat: list[bytes]) -> dict[str, bytes]:
    return {member_id.decode(): record for member_id, record in zip(flat[::2], flat[1::2], strict=True)}


@contextlib.contextmanager
def _directory_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise DirectoryError(str(error)) from error
