"""PoolClient: the one object through which workers and the gateway see the pool.

No fault of the pool reaches the caller: a store that is down, slow or full, and a block that is damaged, truncated or
of other tokens, are misses or dropped publishes with a reason, and counted. After a failure the store is left alone
for a moment, so that an outage costs each request milliseconds instead of a timeout.
"""

import enum
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from memory_pool.block import BlockFormat, Damage, Tokens
from memory_pool.placement import place_of
from memory_pool.redis_store import AsyncRedisStore, RedisStore
from memory_pool.store import Get, Put, Store, StoreError

DEFAULT_BLOCK_TTL_S = 24 * 3600.0
DEFAULT_TAIL_TTL_S = 120.0

_PAUSE_S = 0.25


class Reason(enum.StrEnum):
    """Why a block was not fetched or not published."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    FOREIGN = "foreign"
    UNAVAILABLE = "unavailable"
    FULL = "full"


_DAMAGED = frozenset({Reason.CORRUPT, Reason.TRUNCATED, Reason.FOREIGN})


@dataclass(frozen=True, slots=True)
class FetchItem:
    """One block wanted: its tokens prove that it is the right one; `into` takes the payload."""

    key: bytes
    tokens: Tokens
    into: memoryview


@dataclass(frozen=True, slots=True)
class FetchResult:
    """`num_bytes` moved and the `seconds` until they were there and verified; `into` is garbage unless `ok`."""

    ok: bool
    reason: Reason | None
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PutItem:
    """One block to publish. `ttl_s` is for tails and other request-scoped blocks, which replace an older one."""

    key: bytes
    tokens: Tokens
    payload: memoryview
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class PutResult:
    """`ok`: the block is in the pool now. `num_bytes` moved, 0 when it was there before."""

    ok: bool
    reason: Reason | None
    num_bytes: int
    seconds: float


class _Rest:
    """Leaves a failed store alone for a moment. Thread-safe: a float is written whole."""

    def __init__(self) -> None:
        self._until = 0.0

    def failed(self) -> None:
        self._until = time.monotonic() + _PAUSE_S

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until


class PoolClient:
    """A worker's door to the pool: synchronous, shared by threads. No verb raises because of the pool."""

    def __init__(
        self, store: Store | str, block_format: BlockFormat, *, block_ttl_s: float = DEFAULT_BLOCK_TTL_S
    ) -> None:
        self._store: Store = RedisStore(store) if isinstance(store, str) else store
        self._format = block_format
        self._block_ttl_s = block_ttl_s
        self._rest = _Rest()
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are in the pool; 0 when it cannot be asked."""
        count = 0
        if keys and self._rest.over:
            try:
                count = self._store.count_prefix(keys)
            except StoreError:
                self._store_failed()
        self._count(queries=len(keys), hits=count)
        return count

    def fetch(self, items: Sequence[FetchItem]) -> list[FetchResult]:
        """Read blocks into their buffers and verify them.

        All are read before the first is verified: a pause between two reads would make the server wait for room in
        the socket, fall asleep and be woken again, which costs more than reading the payload from memory once more.
        """
        headers = [memoryview(bytearray(self._format.header_bytes(len(item.tokens)))) for item in items]
        gets = [Get(item.key, (header, item.into)) for item, header in zip(items, headers, strict=True)]
        arrivals: list[tuple[int | None, float]] = []
        clock = time.perf_counter
        if items and self._rest.over:
            before = clock()
            try:
                for length in self._store.get_many(gets):
                    now = clock()
                    arrivals.append((length, now - before))
                    before = now
            except StoreError:
                self._store_failed()
        results: list[FetchResult] = []
        for item, header, (length, seconds) in zip(items, headers, arrivals, strict=False):
            before = clock()
            reason = self._examine(item, header, length)
            results.append(FetchResult(reason is None, reason, length or 0, seconds + clock() - before))
        lost = FetchResult(False, Reason.UNAVAILABLE, 0, 0.0)
        results += [lost] * (len(items) - len(results))
        self.delete([i.key for i, r in zip(items, results, strict=True) if r.reason in _DAMAGED])
        for result in results:
            self._count(**{"fetched" if result.reason is None else f"missed_{result.reason}": 1})
        self._count(fetched_bytes=sum(result.num_bytes for result in results if result.ok))
        return results

    def publish(self, items: Sequence[PutItem]) -> list[PutResult]:
        """Store blocks. The payloads must not change until this returns. Blocks already there are not sent again."""
        started_at = time.perf_counter()
        present: list[bool] = []
        stored: list[bool] = []
        wanted: list[PutItem] = []
        if items and self._rest.over:
            try:
                present = [
                    there and item.ttl_s is None
                    for item, there in zip(items, self._store.exists([i.key for i in items]), strict=True)
                ]
                wanted = [item for item, there in zip(items, present, strict=True) if not there]
                stored = self._store.put_many([self._put(item) for item in wanted])
            except StoreError:
                self._store_failed()
                stored = []
        seconds = (time.perf_counter() - started_at) / max(1, len(items))
        outcome = dict(zip((item.key for item in wanted), stored, strict=False))
        results = [
            self._put_result(item, bool(present) and present[index], outcome.get(item.key), seconds)
            for index, item in enumerate(items)
        ]
        for result in results:
            self._count(**{"published" if result.reason is None else f"dropped_{result.reason}": 1})
        self._count(published_bytes=sum(result.num_bytes for result in results))
        return results

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove blocks, e.g. a tail once it was read; how many there were."""
        if keys and self._rest.over:
            try:
                return self._store.delete(keys)
            except StoreError:
                self._store_failed()
        return 0

    def place_of(self, key: bytes) -> str:
        """The virtual supernode CPU whose DRAM holds the block, e.g. `cpu:17`."""
        return place_of(key)

    def stats(self) -> dict[str, int]:
        """Counts since this client was made."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Release connections. Idempotent."""
        self._store.close()

    def _examine(self, item: FetchItem, header: memoryview, length: int | None) -> Reason | None:
        if length is None:
            return Reason.ABSENT
        if length != header.nbytes + item.into.nbytes:
            return Reason.TRUNCATED
        damage: Damage | None = self._format.verify(item.key, item.tokens, header, item.into)
        return None if damage is None else Reason(damage.value)

    def _put(self, item: PutItem) -> Put:
        header = self._format.encode_header(item.key, item.tokens, item.payload)
        ttl_s = self._block_ttl_s if item.ttl_s is None else item.ttl_s
        return Put(item.key, (header, item.payload), ttl_s, replace=item.ttl_s is not None)

    def _put_result(self, item: PutItem, present: bool, stored: bool | None, seconds: float) -> PutResult:
        if present:
            return PutResult(True, None, 0, seconds)
        if stored:
            return PutResult(True, None, self._format.value_bytes(len(item.tokens)), seconds)
        return PutResult(False, Reason.UNAVAILABLE if stored is None else Reason.FULL, 0, seconds)

    def _store_failed(self) -> None:
        self._rest.failed()
        self._count(store_failures=1)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] = self._counts.get(name, 0) + number


class AsyncPoolClient:
    """The gateway's door to the pool, on one event loop. No verb raises because of the pool."""

    def __init__(self, url: str) -> None:
        self._store = AsyncRedisStore(url)
        self._rest = _Rest()

    async def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are in the pool; 0 when it cannot be asked."""
        if not keys or not self._rest.over:
            return 0
        try:
            return await self._store.count_prefix(keys)
        except StoreError:
            self._rest.failed()
            return 0

    async def stats(self) -> dict[str, int]:
        """What the pool holds."""
        return {}

    async def close(self) -> None:
        """Release connections."""
        await self._store.close()
