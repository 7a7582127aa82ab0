"""What an operator does to the pool: look at it, set quotas, share and pin prefixes, throw a namespace out.

Verbs raise StoreError.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory_pool.books import Books, check_namespace
from memory_pool.disk_tier import DiskReader
from memory_pool.pins import Pin, Pins
from memory_pool.redis_store import RedisStore, redis_key
from memory_pool.scripts import PIN_PREFIX
from memory_pool.shared_prefixes import SharedPrefix, SharedPrefixes

_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """One block in the books. `ttl_s` and `idle_s` None: it is not in DRAM, or held and so without a time to live."""

    key: str
    num_bytes: int
    stored: bool
    writers: int
    in_dram: bool
    on_disk: bool
    holders: int
    """Leases on it: readers, handovers under way, pins."""
    is_pinned: bool
    ttl_s: float | None
    idle_s: float | None


class PoolAdmin:
    """An operator's door to the pool. `disk_folder`: that of the disk tier, where there is one."""

    def __init__(self, url: str, *, disk_folder: Path | None = None) -> None:
        self._store = RedisStore(url)
        self._books = Books(self._store.connection)
        self._prefixes = SharedPrefixes(self._store.connection)
        self._pins = Pins(self._store.connection)
        self._disk = None if disk_folder is None else DiskReader(disk_folder)

    def stats(self) -> dict[str, Any]:
        """What the pool holds and did."""
        return self._books.statistics().as_dict()

    def inspect(self, namespace: str, *, most: int = 100) -> list[dict[str, Any]]:
        """The blocks of a namespace, least recently used last. Raises ValueError when `namespace` is not a name."""
        charges = self._books.charges(check_namespace(namespace))
        names = [redis_key(charge.key) for charge in charges]
        ask = self._store.connection.call_many
        verbs = (("EXISTS",), ("PTTL",), ("OBJECT", "IDLETIME"))
        there, ttls_ms, idle_s = ([*ask([(*verb, name) for name in names])] for verb in verbs)
        held = self._store.holders([charge.key for charge in charges])
        found = [
            BlockInfo(
                key=charge.key.hex(),
                num_bytes=charge.num_bytes,
                stored=charge.stored,
                writers=charge.writers,
                in_dram=bool(there[index]),
                on_disk=self._disk is not None and self._disk.contains(namespace, charge.key),
                holders=len(held[index]),
                is_pinned=any(holder.startswith(PIN_PREFIX) for holder in held[index]),
                ttl_s=ttls_ms[index] / 1000 if ttls_ms[index] >= 0 else None,
                idle_s=idle_s[index],
            )
            for index, charge in enumerate(charges)
        ]
        found.sort(key=lambda block: (block.idle_s is None, block.idle_s or 0.0))
        return [asdict(block) for block in found[:most]]

    def set_quota(self, namespace: str, quota_bytes: int | None) -> None:
        """Limit a namespace; None: no limit. Raises ValueError for a bad name or a negative quota."""
        self._books.set_quota(namespace, quota_bytes)

    def purge(self, namespace: str) -> int:
        """Remove a namespace's blocks from DRAM and disk, refund them, and close its account; how many there were.

        Blocks that somebody reads or is writing stay, and with them the account.
        """
        charges = self._books.charges(check_namespace(namespace))
        removed = 0
        for start in range(0, len(charges), _BATCH):
            batch = charges[start : start + _BATCH]
            gone = self._store.evict([charge.key for charge in batch], even_pinned=True)
            there = self._store.exists([charge.key for charge in batch])
            refund = {
                c.key: c.raw for c, still in zip(batch, there, strict=True) if not still and not c.writers
            }
            removed += sum(gone)
            self._books.forget(namespace, "purged", refund)
            if self._disk is not None:
                for key in refund:
                    self._disk.delete(namespace, key)
        if not self._books.charges(namespace):
            self._books.close_account(namespace)
        return removed

    def share(self, name: str, prefix: SharedPrefix) -> None:
        """Open a prefix to all tenants."""
        self._prefixes.share(name, prefix)

    def unshare(self, name: str) -> bool:
        """Close it again; False when there is none of that name."""
        return self._prefixes.unshare(name)

    def shared(self) -> dict[str, SharedPrefix]:
        """The prefixes that are open to all, by name."""
        return self._prefixes.all()

    def pin(self, namespace: str, name: str, *, num_tokens: int, keys: Sequence[bytes], ttl_s: float) -> Pin:
        """Keep blocks in DRAM for a while. Raises TooManyPinsError, and ValueError when `namespace` is not a name."""
        return self._pins.pin(check_namespace(namespace), name, num_tokens=num_tokens, keys=keys, ttl_s=ttl_s)

    def unpin(self, namespace: str, name: str) -> bool:
        """End a pin; False when there is none of that name."""
        return self._pins.unpin(namespace, name)

    def pins(self) -> list[tuple[Pin, float]]:
        """The pins under way, each with the seconds it has left."""
        now_ms = self._pins.now_ms()
        return [(pin, (pin.until_ms - now_ms) / 1000) for pin in self._pins.all() if pin.until_ms > now_ms]

    def close(self) -> None:
        """Release connections."""
        self._store.close()
