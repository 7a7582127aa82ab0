"""The keeper: the process that keeps the pool's house, while workers only read and write blocks.

Each pass, in order: hold what is pinned, put fresh blocks on disk, evict above the watermarks (the whole DRAM, and
each namespace's quota), bring blocks that were found on disk back to DRAM, copy the operators' decisions, and now and
then audit the books: dead writers, blocks that Redis dropped, leases that ran out. Blocks go to disk behind the
writers' backs: who publishes never waits for the disk. When the disk is slower than the writers the keeper works
without a pause, evicts nothing that it has not saved, and what Redis drops before is counted as lost. When no keeper
runs the pool still serves: Redis evicts by itself, nothing is lost but the disk tier's news.

`python -m memory_pool.keeper --disk-folder D --disk-bytes N`; the Redis URL comes in CLOUDMATRIX_REDIS_URL.
"""

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from memory_pool import scripts
from memory_pool.block import intact
from memory_pool.books import Admission, Books, Charge
from memory_pool.charter import Charter
from memory_pool.disk_tier import DiskTier
from memory_pool.eviction import LruIndex, Watermarks
from memory_pool.pins import Pin, Pins
from memory_pool.redis_store import LEASE_PREFIX, RedisStore, by_tag, redis_key
from memory_pool.shared_prefixes import SharedPrefixes
from memory_pool.store import Put, StoreError
from observe import logs

PASS_S = 0.25
AUDIT_S = 5.0
BLOCK_TTL_S = 24 * 3600.0
PIN_LEASE_S = 60.0
"""A pin's leases are renewed at every audit; without a keeper they run out."""
PARENT_VARIABLE = "CLOUDMATRIX_PARENT_PID"
"""Set by whoever starts this process and wants it to end with itself."""

_BATCH = 32
_CANDIDATES = 256
"""Blocks of each namespace looked at in one step of an eviction."""
_BATCHES = 8
"""Batches of one pass, so that a busy pool does not keep the keeper from its other work."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Integrity:
    """What an audit found; the books balance when everything is 0."""

    uncharged_bytes: int = 0
    """Account less the sum of its charges."""
    vanished: int = 0
    """Charged blocks that are no more, refunded by the audit."""
    wrong_size: int = 0
    """Blocks whose length is not what was charged, deleted by the audit."""
    dead_writers: int = 0
    """Unfinished puts, cleaned up by the audit."""
    expired_leases: int = 0


class Keeper:
    """Used by one thread. `disk` None: no disk tier. Verbs raise StoreError when Redis cannot be reached."""

    def __init__(
        self, url: str, *, disk: DiskTier | None = None, watermarks: Watermarks | None = None
    ) -> None:
        self._store = RedisStore(url)
        self._connection = self._store.connection
        self._books = Books(self._connection)
        self._pins = Pins(self._connection)
        self._pinned: dict[str, Pin] = {}
        self._pin_again_at = 0.0
        self._disk = disk
        self._watermarks = watermarks or Watermarks()
        self._charter = (
            None
            if disk is None
            else Charter(disk.folder, self._books, SharedPrefixes(self._connection), self._pins)
        )

    def run_pass(self) -> bool:
        """One round of everything but the audit; whether blocks still wait to be put on disk."""
        namespaces = self._books.namespaces()
        self._pin()
        for namespace in namespaces:
            self.persist(namespace)
        for namespace in namespaces:
            self._evict_over_quota(namespace)
        self._evict_over_watermark()
        for namespace in namespaces:
            self.promote(namespace)
        if self._disk is None or self._charter is None:
            return False
        self._charter.keep()
        backlog = sum(self._books.backlog(namespace) for namespace in namespaces)
        self._books.note_disk(
            used_bytes=self._disk.used_bytes,
            capacity_bytes=self._disk.capacity_bytes,
            blocks=len(self._disk),
            evictions=self._disk.num_evicted,
            failures=self._disk.num_failures,
            backlog=backlog,
        )
        return backlog > 0

    def persist(self, namespace: str) -> int:
        """Put blocks stored since the last time on disk, at most a pass's worth; how many."""
        written = 0
        for _ in range(_BATCHES):
            fresh = self._books.take_fresh(namespace, _BATCH)
            if self._disk is None or not fresh:
                break
            written += self._save(namespace, fresh)
        return written

    def promote(self, namespace: str) -> int:
        """Bring blocks that a reader found on disk back to DRAM, at most a pass's worth; how many."""
        wanted = self._books.take_wanted(namespace, _BATCH)
        if self._disk is None or not wanted or self._excess_bytes():
            return 0
        promoted = 0
        for key in dict.fromkeys(wanted):
            value = self._disk.read(namespace, key)
            if value is not None and intact(value):
                promoted += self._restore(namespace, key, value)
        return promoted

    def audit(self) -> Integrity:
        """Hold the books against what is there, and mend them."""
        found = Integrity()
        if self._disk is not None:
            self._disk.refresh()
        now_ms = self._books.now_ms()
        for namespace in self._books.namespaces():
            charges = self._books.charges(namespace)
            lengths = self._connection.call_many([("STRLEN", redis_key(charge.key)) for charge in charges])
            vanished: dict[bytes, bytes] = {}
            for charge, length in zip(charges, lengths, strict=True):
                if charge.writers and charge.deadline_ms < now_ms:
                    found.dead_writers += charge.writers
                    outcome = {charge.key: length == charge.num_bytes}
                    for _ in range(charge.writers):
                        self._books.settle(namespace, outcome)
                elif not charge.writers and not length:
                    vanished[charge.key] = charge.raw
                elif not charge.writers and length != charge.num_bytes:
                    found.wrong_size += 1
                    self._store.delete([charge.key])
                    self._books.forget(namespace, "damaged", {charge.key: charge.raw})
            found.vanished += self._books.forget(namespace, "evicted", vanished)
            self._note_lost(namespace, vanished)
            found.uncharged_bytes += self._books.imbalance(namespace)
        for name in self._connection.scan(f"{LEASE_PREFIX}*"):
            swept = self._connection.run(scripts.SWEEP_LEASES, [name], [round(BLOCK_TTL_S * 1000)])
            found.expired_leases += int(swept)
        marks = self._watermarks
        self._books.note_audit(asdict(found), high_watermark=marks.high, watermark_step=marks.step)
        return found

    def close(self) -> None:
        """Release connections."""
        self._store.close()

    def _pin(self) -> None:
        """Hold what is pinned, now and then again, for blocks come and go; let go what is not pinned any more."""
        pins = {pin.field: pin for pin in self._pins.all()}
        now = time.monotonic()
        if pins == self._pinned and now < self._pin_again_at:
            return
        self._pin_again_at = now + AUDIT_S
        now_ms = self._pins.now_ms()
        for pin in list(pins.values()):
            if pin.until_ms <= now_ms:
                self._pins.unpin(pin.namespace, pin.name)
                del pins[pin.field]
            else:
                for run in by_tag(pin.keys):
                    self._store.lease(run, pin.holder, min(PIN_LEASE_S, (pin.until_ms - now_ms) / 1000))
        for field, pin in self._pinned.items():
            if pins.get(field) != pin:
                gone = set(pin.keys) - set(pins[field].keys if field in pins else ())
                self._store.release([key for key in pin.keys if key in gone], pin.holder, BLOCK_TTL_S)
        self._pinned = pins

    def _evict_over_watermark(self) -> None:
        excess = self._excess_bytes()
        if excess:
            self._evict(self._books.namespaces(), excess)

    def _excess_bytes(self) -> int:
        used, allowed = self._connection.memory()
        return self._watermarks.bytes_to_free(used, allowed) if allowed else 0

    def _evict_over_quota(self, namespace: str) -> None:
        used, quota = self._books.usage(namespace)
        excess = 0 if quota is None else self._watermarks.bytes_to_free(used, quota)
        if excess:
            self._evict([namespace], excess)

    def _evict(self, namespaces: Sequence[str], num_bytes: int) -> None:
        """Remove least recently used blocks until `num_bytes` are free: pinned ones last, held ones not at all."""
        for even_pinned in (False, True):
            if num_bytes > 0:
                num_bytes -= self._evict_all(namespaces, num_bytes, even_pinned=even_pinned)

    def _evict_all(self, namespaces: Sequence[str], num_bytes: int, *, even_pinned: bool) -> int:
        freed = 0
        held: set[tuple[str, bytes]] = set()
        while freed < num_bytes:
            oldest = [
                (at, n, charge) for n in namespaces for at, charge in self._books.oldest(n, _CANDIDATES)
            ]
            index: LruIndex[tuple[str, bytes]] = LruIndex()
            charges: dict[tuple[str, bytes], Charge] = {}
            for _, namespace, charge in sorted(oldest, key=lambda each: each[0]):
                if not charge.writers and (namespace, charge.key) not in held:
                    index.insert((namespace, charge.key), charge.num_bytes)
                    charges[namespace, charge.key] = charge
            victims = index.victims(num_bytes - freed, 0.0)
            if not victims:
                break  # what is held was used last, so that behind it there is nothing
            for namespace in namespaces:
                chosen = [charges[victim] for victim in victims if victim[0] == namespace]
                gone = self._remove(namespace, chosen, even_pinned=even_pinned)
                freed += sum(charge.num_bytes for charge in gone)
                held.update((namespace, charge.key) for charge in chosen if charge not in gone)
        return freed

    def _remove(self, namespace: str, charges: Sequence[Charge], *, even_pinned: bool) -> list[Charge]:
        """Evict blocks that nobody holds, on disk first if they are not there; those that are gone."""
        if self._disk is not None:
            disk = self._disk
            self._save(
                namespace, [charge.key for charge in charges if not disk.contains(namespace, charge.key)]
            )
        self._store.evict([charge.key for charge in charges], even_pinned=even_pinned)
        there = self._store.exists([charge.key for charge in charges])
        gone = [charge for charge, still in zip(charges, there, strict=True) if not still]
        self._books.forget(namespace, "evicted", {charge.key: charge.raw for charge in gone})
        self._note_lost(namespace, [charge.key for charge in gone])
        # What is held is being read: it is not the least recently used.
        held = [charge.key for charge, still in zip(charges, there, strict=True) if still]
        if held:
            self._books.note_fetch(namespace, held, {})
        return gone

    def _note_lost(self, namespace: str, gone: Iterable[bytes]) -> None:
        if self._disk is not None:
            disk = self._disk
            self._books.note_lost(namespace, sum(not disk.contains(namespace, key) for key in gone))

    def _save(self, namespace: str, keys: Sequence[bytes]) -> int:
        """Put blocks on disk; how many."""
        assert self._disk is not None
        saved = 0
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            values = self._connection.call_many([("GET", redis_key(key)) for key in batch])
            for key, value in zip(batch, values, strict=True):
                saved += value is not None and intact(value) and self._disk.write(namespace, key, value)
        return saved

    def _restore(self, namespace: str, key: bytes, value: bytes) -> bool:
        if self._books.admit(namespace, [(key, len(value))], also_stored=True) != [Admission.CHARGED]:
            return False
        stored = self._store.put_many([Put(key, len(value), lambda: [value], BLOCK_TTL_S)]) == [True]
        self._books.settle(namespace, {key: stored})
        return stored


def keep(keeper: Keeper, stop: threading.Event, *, pass_s: float = PASS_S, audit_s: float = AUDIT_S) -> None:
    """Keep house until told to stop, or until the process that started this one is gone."""
    parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    audit_at = time.monotonic() + audit_s
    pause_s = pass_s
    while not stop.wait(pause_s) and os.getppid() == parent:
        pause_s = pass_s
        try:
            if keeper.run_pass():
                pause_s = 0.0
            if time.monotonic() >= audit_at:
                found = keeper.audit()
                if found != Integrity():
                    logger.info("audit: %s", found)
                audit_at = time.monotonic() + audit_s
        except StoreError as error:
            logger.warning("the pool cannot be reached: %s", error)


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description="Keeps the memory pool's house.")
    parser.add_argument("--disk-folder", type=Path, help="folder of the disk tier; without it there is none")
    parser.add_argument(
        "--disk-bytes", type=int, default=8 << 30, help="capacity of the disk tier (default: 8 GiB)"
    )
    parser.add_argument(
        "--high-watermark",
        type=float,
        default=os.environ.get("CLOUDMATRIX_POOL_HIGH_WATERMARK", Watermarks().high),
        help="share of DRAM and of each quota above which blocks are evicted (default: %(default)s)",
    )
    parser.add_argument(
        "--watermark-step",
        type=float,
        default=os.environ.get("CLOUDMATRIX_POOL_WATERMARK_STEP", Watermarks().step),
        help="share that is freed at a time (default: %(default)s)",
    )
    options = parser.parse_args()
    url = os.environ.get("CLOUDMATRIX_REDIS_URL")
    if not url:
        parser.error("CLOUDMATRIX_REDIS_URL is not set: it names the Redis server of the pool")
    try:
        logs.configure(os.environ.get(logs.VARIABLE, "text"), process="keeper")
    except ValueError as error:
        parser.error(str(error))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    disk = DiskTier(options.disk_folder, options.disk_bytes) if options.disk_folder else None
    try:
        watermarks = Watermarks(options.high_watermark, options.watermark_step)
    except ValueError as error:
        parser.error(str(error))
    keeper = Keeper(url, disk=disk, watermarks=watermarks)
    try:
        keep(keeper, stop)
    finally:
        keeper.close()


if __name__ == "__main__":
    main()
