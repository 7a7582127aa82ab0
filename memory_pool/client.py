"""PoolClient: the one object through which workers see the pool.

No fault of the pool reaches the caller: a store that is down, slow or full, and a block that is damaged, truncated or
of other tokens, are misses or dropped publishes with a reason, and counted. After a failure the store is left alone
for a moment, so that an outage costs each request milliseconds instead of a timeout.
"""

import enum
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from memory_pool.block import TRAILER_BYTES, BlockFormat, Damage, Tokens
from memory_pool.books import Admission, Books
from memory_pool.contents import Contents
from memory_pool.disk_tier import DiskReader
from memory_pool.keys import DEFAULT_NAMESPACE
from memory_pool.placement import place_of
from memory_pool.redis_store import RedisStore
from memory_pool.rest import Rest
from memory_pool.statistics import NEVER_SEEN, PoolStatistics
from memory_pool.store import Get, Put, Store, StoreError, StoreFullError
from memory_pool.target import Checked

DEFAULT_BLOCK_TTL_S = 24 * 3600.0
DEFAULT_TAIL_TTL_S = 120.0
DEFAULT_LEASE_S = 60.0
UNAVAILABLE = "unavailable"
"""Why a block was not found when the pool could not be asked."""


class Reason(enum.StrEnum):
    """Why a block was not fetched or not published."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    FOREIGN = "foreign"
    UNAVAILABLE = "unavailable"
    FULL = "full"
    """The store has no room and nothing to evict."""
    OVER_QUOTA = "over_quota"
    """The namespace has no room."""


_Side = tuple[memoryview, memoryview]
"""Header and trailer of a block."""
_DAMAGED = frozenset({Reason.CORRUPT, Reason.TRUNCATED, Reason.FOREIGN})


@dataclass(frozen=True, slots=True)
class FetchItem:
    """One block wanted: its tokens prove that it is the right one; `into` takes the payload."""

    key: bytes
    tokens: Tokens
    into: memoryview
    namespace: str = DEFAULT_NAMESPACE


@dataclass(frozen=True, slots=True)
class FetchResult:
    """`num_bytes` moved and the `seconds` until they were there and verified; `into` is garbage unless `ok`."""

    ok: bool
    reason: Reason | None
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PutItem:
    """One block to publish, charged to its namespace.

    `ttl_s` is for tails and other request-scoped blocks: they replace an older one and are not charged.
    """

    key: bytes
    tokens: Tokens
    payload: memoryview
    ttl_s: float | None = None
    namespace: str = DEFAULT_NAMESPACE
    content: bytes | None = None
    """Its name whoever wrote it (`keys.content_keys`), to tell later why somebody else does not find it."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """`ok`: the block is in the pool now. `num_bytes` moved, 0 when it was there before."""

    ok: bool
    reason: Reason | None
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Lookup:
    """How many leading blocks are in the pool, and why the first missing one is not (None: none is, or unknown)."""

    num_blocks: int
    miss_reason: str | None


class PoolClient:
    """A worker's door to the pool: synchronous, shared by threads. No verb raises because of the pool."""

    def __init__(
        self,
        store: Store | str,
        block_format: BlockFormat,
        *,
        block_ttl_s: float = DEFAULT_BLOCK_TTL_S,
        disk: DiskReader | None = None,
    ) -> None:
        self._store: Store = RedisStore(store) if isinstance(store, str) else store
        self._books = Books(self._store.connection) if isinstance(self._store, RedisStore) else None
        self._contents = Contents(self._store.connection) if isinstance(self._store, RedisStore) else None
        self._format = block_format
        self._block_ttl_s = block_ttl_s
        self._disk = disk
        self._rest = Rest()

    def lookup(self, keys: Sequence[bytes], namespace: str = DEFAULT_NAMESPACE) -> int:
        """How many leading blocks are in the pool; 0 when it cannot be asked."""
        return self.look(keys, namespace).num_blocks

    def look(
        self,
        keys: Sequence[bytes],
        namespace: str = DEFAULT_NAMESPACE,
        *,
        holder: str | None = None,
        contents: Sequence[bytes] = (),
    ) -> Lookup:
        """How many leading blocks are in the pool, and why not more; none when it cannot be asked.

        With a `holder`, those found in DRAM are leased to it, in the same step that finds them. With the `contents`
        of the keys (`keys.content_keys`), a block that only others have is told from one that nobody has.
        """
        if not keys:
            return Lookup(0, None)
        if not self._rest.over:
            return Lookup(0, UNAVAILABLE)
        count, reason = 0, None
        try:
            if holder is None:
                count = self._store.count_prefix(keys)
            else:
                count = self._store.lease(keys, holder, DEFAULT_LEASE_S)
            if count < len(keys) and self._disk is not None and self._disk.contains(namespace, keys[count]):
                there = self._store.exists(keys[count:])
                count += leading(self._disk, [namespace] * len(there), keys[count:], there)
            if self._books is not None:
                missing = keys[count] if count < len(keys) else None
                reason = self._books.note_lookup(namespace, queries=len(keys), hits=count, missing=missing)
                if (
                    reason == NEVER_SEEN
                    and contents
                    and self._contents
                    and self._contents.knows(contents[count])
                ):
                    reason = self._books.note_other_namespace(namespace)
        except StoreFullError:
            pass  # not counted
        except StoreError:
            self._rest.failed()
            reason = UNAVAILABLE
        return Lookup(count, reason)

    def lease(self, keys: Sequence[bytes], *, holder: str, ttl_s: float = DEFAULT_LEASE_S) -> int:
        """Hold leading blocks against eviction, until released or `ttl_s` is over; how many are there and held.

        A pin is a lease with a long life. 0 when the pool cannot be asked.
        """
        if keys and self._rest.over:
            try:
                return self._store.lease(keys, holder, ttl_s)
            except StoreFullError:
                return 0
            except StoreError:
                self._rest.failed()
        return 0

    def release(self, keys: Sequence[bytes], *, holder: str) -> None:
        """End the holder's leases; what cannot be released now runs out by itself."""
        if keys and self._rest.over:
            try:
                self._store.release(keys, holder, self._block_ttl_s)
            except StoreError:
                self._rest.failed()

    def fetch(self, items: Sequence[FetchItem]) -> list[FetchResult]:
        """Read blocks into their buffers and verify them; what is not the block asked for is deleted.

        Checksums are computed as the bytes arrive, the rest is verified when all are there: a long pause between two
        reads would make the server wait for room in the socket, fall asleep and be woken again.
        """
        sides = [
            (self._side(self._format.header_bytes(len(i.tokens))), self._side(TRAILER_BYTES)) for i in items
        ]
        digests = [xxhash.xxh3_64() for _ in items]
        lengths: list[int | None] = []
        started_at = time.perf_counter()
        if items and self._rest.over:
            gets = [
                Get(item.key, (header, Checked(item.into, digest), trailer))
                for item, (header, trailer), digest in zip(items, sides, digests, strict=True)
            ]
            try:
                lengths = self._store.get_many(gets)
            except StoreError:
                self._rest.failed()
        if not lengths:
            return [FetchResult(False, Reason.UNAVAILABLE, 0, 0.0)] * len(items)
        read_s = (time.perf_counter() - started_at) / len(items)
        results: list[FetchResult] = []
        from_disk: list[FetchItem] = []
        damaged: list[FetchItem] = []
        for item, side, digest, length in zip(items, sides, digests, lengths, strict=True):
            started_at = time.perf_counter()
            reason = self._examine(item, side, length, digest.intdigest())
            if reason in _DAMAGED:
                damaged.append(item)
            if reason is not None and self._read_from_disk(item, side):
                from_disk.append(item)
                length, reason = self._format.value_bytes(len(item.tokens)), None
            seconds = read_s + time.perf_counter() - started_at
            results.append(FetchResult(reason is None, reason, length or 0, seconds))
        self._note_fetch(items, results, from_disk, damaged)
        return results

    def publish(self, items: Sequence[PutItem]) -> list[PutResult]:
        """Store blocks. The payloads must not change until this returns. Blocks already there are not sent again."""
        if not items or not self._rest.over:
            return [PutResult(False, Reason.UNAVAILABLE, 0, 0.0)] * len(items)
        started_at = time.perf_counter()
        reasons: dict[int, Reason | None] = {}
        stored: list[int] = []
        try:
            admitted = self._admit(items, reasons)
            for index, done in zip(
                admitted, self._store.put_many([self._put(items[i]) for i in admitted]), strict=True
            ):
                reasons[index] = None if done else Reason.FULL
                if done:
                    stored.append(index)
            self._settle(items, admitted, set(stored))
        except StoreFullError:
            reasons = {index: reasons.get(index, Reason.FULL) for index in range(len(items))}
        except StoreError:
            self._rest.failed()
        seconds = (time.perf_counter() - started_at) / len(items)
        sizes = {index: self._format.value_bytes(len(items[index].tokens)) for index in stored}
        return [
            PutResult(reason is None, reason, sizes.get(index, 0), seconds)
            for index in range(len(items))
            for reason in [reasons.get(index, Reason.UNAVAILABLE)]
        ]

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove blocks, e.g. a tail once it was read; how many there were."""
        if keys and self._rest.over:
            try:
                return self._store.delete(keys)
            except StoreError:
                self._rest.failed()
        return 0

    def place_of(self, key: bytes) -> str:
        """The virtual supernode CPU whose DRAM holds the block, e.g. `cpu:17`."""
        return place_of(key)

    def stats(self) -> dict[str, Any]:
        """`statistics` as plain values, for JSON."""
        return self.statistics().as_dict()

    def statistics(self) -> PoolStatistics:
        """What the pool holds and did, over all its clients."""
        if self._books is not None and self._rest.over:
            try:
                return self._books.statistics()
            except StoreError:
                self._rest.failed()
        return PoolStatistics(available=False)

    def close(self) -> None:
        """Release connections. Idempotent."""
        self._store.close()

    @staticmethod
    def _side(num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def _examine(
        self, item: FetchItem, side: _Side, length: int | None, checksum: int | None = None
    ) -> Reason | None:
        header, trailer = side
        if length is None:
            return Reason.ABSENT
        if length != header.nbytes + item.into.nbytes + trailer.nbytes:
            return Reason.TRUNCATED
        damage: Damage | None = self._format.verify(
            item.key, item.tokens, header, item.into, trailer, checksum
        )
        return None if damage is None else Reason(damage.value)

    def _read_from_disk(self, item: FetchItem, side: _Side) -> bool:
        if self._disk is None:
            return False
        length = self._disk.read_into(item.namespace, item.key, (side[0], item.into, side[1]))
        reason = self._examine(item, side, length)
        if reason in _DAMAGED:
            self._disk.delete(item.namespace, item.key)
        return reason is None

    def _note_fetch(
        self,
        items: Sequence[FetchItem],
        results: Sequence[FetchResult],
        from_disk: Sequence[FetchItem],
        damaged: Sequence[FetchItem],
    ) -> None:
        """Count what came of a fetch; `damaged` are those whose value in the store was, saved by the disk or not."""
        self.delete([item.key for item in damaged])
        if self._books is None:
            return
        try:
            for namespace in {item.namespace for item in items}:
                good = [r for i, r in zip(items, results, strict=True) if r.ok and i.namespace == namespace]
                wanted = [item.key for item in from_disk if item.namespace == namespace]
                counts = {
                    "fetched": len(good),
                    "fetched_bytes": sum(result.num_bytes for result in good),
                    "disk_hits": len(wanted),
                }
                read = [
                    i.key for i, r in zip(items, results, strict=True) if r.ok and i.namespace == namespace
                ]
                self._books.note_fetch(namespace, read, counts)
                self._books.want(namespace, wanted)
                lost = {item.key: b"" for item in damaged if item.namespace == namespace}
                self._books.forget(namespace, "damaged", lost)
        except StoreFullError:
            pass  # not counted
        except StoreError:
            self._rest.failed()

    def _admit(self, items: Sequence[PutItem], reasons: dict[int, Reason | None]) -> list[int]:
        """The items to send, by index; `reasons` takes what became of the others."""
        blocks = [index for index, item in enumerate(items) if item.ttl_s is None]
        admitted = [index for index, item in enumerate(items) if item.ttl_s is not None]
        if self._books is None:
            present = self._store.exists([items[index].key for index in blocks])
            reasons.update({index: None for index, there in zip(blocks, present, strict=True) if there})
            return sorted(admitted + [i for i, there in zip(blocks, present, strict=True) if not there])
        for namespace in {items[index].namespace for index in blocks}:
            mine = [index for index in blocks if items[index].namespace == namespace]
            answers = self._charge(items, mine, also_stored=False)
            believed = [index for index in mine if answers[index] is Admission.BELIEVED_STORED]
            present = self._store.exists([items[index].key for index in believed])
            gone = [index for index, there in zip(believed, present, strict=True) if not there]
            answers |= self._charge(items, gone, also_stored=True)
            for index in mine:
                if answers[index] is Admission.CHARGED:
                    admitted.append(index)
                elif answers[index] is Admission.OVER_QUOTA:
                    reasons[index] = Reason.OVER_QUOTA
                else:
                    reasons[index] = None
        return sorted(admitted)

    def _charge(
        self, items: Sequence[PutItem], indices: list[int], *, also_stored: bool
    ) -> dict[int, Admission]:
        if not indices or self._books is None:
            return {}
        blocks = [(items[i].key, self._format.value_bytes(len(items[i].tokens))) for i in indices]
        answers = self._books.admit(items[indices[0]].namespace, blocks, also_stored=also_stored)
        return dict(zip(indices, answers, strict=True))

    def _settle(self, items: Sequence[PutItem], admitted: Sequence[int], stored: set[int]) -> None:
        if self._books is None:
            return
        for namespace in {items[index].namespace for index in admitted}:
            outcome: dict[bytes, bool] = {}
            for index in admitted:
                if items[index].namespace == namespace and items[index].ttl_s is None:
                    outcome[items[index].key] = index in stored
            mine = [index for index in stored if items[index].namespace == namespace]
            counts = {
                "published": len(mine),
                "published_bytes": sum(self._format.value_bytes(len(items[index].tokens)) for index in mine),
                "dropped_full": sum(not done for done in outcome.values()),
            }
            self.delete(self._books.settle(namespace, outcome, counts))
        if self._contents is not None:
            contents = [items[index].content for index in stored]
            self._contents.note(content for content in contents if content is not None)

    def _put(self, item: PutItem) -> Put:
        parts = functools.partial(self._format.encode, item.key, item.tokens, item.payload)
        ttl_s = self._block_ttl_s if item.ttl_s is None else item.ttl_s
        num_bytes = self._format.value_bytes(len(item.tokens))
        return Put(item.key, num_bytes, parts, ttl_s, replace=item.ttl_s is not None)


def leading(disk: DiskReader, namespaces: Sequence[str], keys: Sequence[bytes], there: Sequence[bool]) -> int:
    """How many leading blocks are in DRAM (`there`) or on disk."""
    for index, (namespace, key, present) in enumerate(zip(namespaces, keys, there, strict=True)):
        if not present and not disk.contains(namespace, key):
            return index
    return len(keys)
