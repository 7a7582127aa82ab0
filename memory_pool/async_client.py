"""AsyncPoolClient: the one object through which the gateway sees the pool. No verb raises because of the pool."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_pool.books import read_statistics
from memory_pool.client import leading
from memory_pool.disk_tier import DiskReader
from memory_pool.keys import DEFAULT_NAMESPACE, namespace_at
from memory_pool.pins import AsyncPins, Pin
from memory_pool.redis_store import AsyncRedisStore
from memory_pool.rest import Rest
from memory_pool.shared_prefixes import AsyncSharedPrefixes, SharedPrefix
from memory_pool.statistics import PoolStatistics
from memory_pool.store import StoreError

SHARED_PREFIXES_AGE_S = 1.0


class AsyncPoolClient:
    """The gateway's door to the pool, on one event loop. No verb raises because of the pool."""

    def __init__(self, url: str, *, disk_folder: Path | None = None) -> None:
        self._store = AsyncRedisStore(url)
        self._disk = None if disk_folder is None else DiskReader(disk_folder)
        self._rest = Rest()
        self._shared = AsyncSharedPrefixes(self._store.connection)
        self._pins = AsyncPins(self._store.connection)
        self._prefixes: Mapping[str, SharedPrefix] = {}
        self._prefixes_until = 0.0

    async def lookup(
        self, keys: Sequence[bytes], namespace: str = DEFAULT_NAMESPACE, *, num_shared_blocks: int = 0
    ) -> int:
        """How many leading blocks are in the pool; 0 when it cannot be asked.

        The first `num_shared_blocks` are of the shared region.
        """
        if not keys or not self._rest.over:
            return 0
        try:
            count = await self._store.count_prefix(keys)
            if count < len(keys) and self._disk is not None:
                namespaces = [
                    namespace_at(index, namespace=namespace, num_shared_blocks=num_shared_blocks)
                    for index in range(len(keys))
                ]
                if self._disk.contains(namespaces[count], keys[count]):
                    there = await self._store.exists(keys[count:])
                    count += leading(self._disk, namespaces[count:], keys[count:], there)
        except StoreError:
            self._rest.failed()
            return 0
        return count

    async def shared_prefixes(self) -> Mapping[str, SharedPrefix]:
        """Prefixes open to all, by name, at most `SHARED_PREFIXES_AGE_S` old; the last known while the pool is away."""
        now = time.monotonic()
        if now >= self._prefixes_until and self._rest.over:
            self._prefixes_until = now + SHARED_PREFIXES_AGE_S
            try:
                self._prefixes = await self._shared.all()
            except StoreError:
                self._rest.failed()
        return self._prefixes

    async def share(self, name: str, prefix: SharedPrefix) -> bool:
        """Open a prefix to all; False when the pool cannot be asked."""
        self._prefixes_until = 0.0
        try:
            await self._shared.share(name, prefix)
        except StoreError:
            return False
        return True

    async def unshare(self, name: str) -> bool | None:
        """Close it again; False when there is none of that name, None when the pool cannot be asked."""
        self._prefixes_until = 0.0
        try:
            return await self._shared.unshare(name)
        except StoreError:
            return None

    async def pins(self) -> list[Pin]:
        """Every pin; none while the pool cannot be asked."""
        try:
            return await self._pins.all()
        except StoreError:
            return []

    async def pin(
        self, namespace: str, name: str, *, num_tokens: int, keys: Sequence[bytes], ttl_s: float
    ) -> Pin | None:
        """Pin blocks; None when the pool cannot be asked. Raises TooManyPinsError."""
        try:
            return await self._pins.pin(namespace, name, num_tokens=num_tokens, keys=keys, ttl_s=ttl_s)
        except StoreError:
            return None

    async def unpin(self, namespace: str, name: str) -> bool | None:
        """End a pin; False when there is none of that name, None when the pool cannot be asked."""
        try:
            return await self._pins.unpin(namespace, name)
        except StoreError:
            return None

    async def now_ms(self) -> int | None:
        """The clock that pins end by; None when the pool cannot be asked."""
        try:
            return await self._pins.now_ms()
        except StoreError:
            return None

    async def stats(self) -> dict[str, Any]:
        """`statistics` as plain values, for JSON."""
        return (await self.statistics()).as_dict()

    async def statistics(self) -> PoolStatistics:
        """What the pool holds and did, over all its clients."""
        if self._rest.over:
            try:
                return await read_statistics(self._store.connection)
            except StoreError:
                self._rest.failed()
        return PoolStatistics(available=False)

    async def close(self) -> None:
        """Release connections."""
        await self._store.close()
