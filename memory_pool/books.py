"""The books of the pool: what each namespace holds, may hold and did. Every entry is one atomic step inside Redis.

The life of a charge:

    absent -> charged, writing -> stored -> absent (evicted, damaged, expired: refunded)
                               -> absent (no writer stored it, or the writers died: refunded)

A namespace's charges never exceed its quota, however many write at once. Request-scoped tails are not charged: they
live for seconds. All verbs raise StoreError when Redis cannot be reached.
"""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_pool import scripts
from memory_pool.connection import AsyncConnection, Connection
from memory_pool.statistics import (
    NEVER_SEEN,
    OTHER_NAMESPACE,
    KeeperStatistics,
    NamespaceStatistics,
    PoolStatistics,
    TierStatistics,
    keeper_statistics,
    namespace_statistics,
)

NAMESPACES = "cm:namespaces"
DISK = "cm:disk"
KEEPER = "cm:keeper"
KEPT = "cm:kept"
WRITE_TIMEOUT_S = 60.0
"""A writer that has not settled by then is taken for dead."""
MAX_REMEMBERED = 20_000
"""Names of lost blocks kept per namespace to tell why a miss missed."""

MAX_WANTED = 1000
"""Blocks waiting to come back from disk; older wishes are dropped."""

_NAME = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,127}")


class Admission(enum.IntEnum):
    """What became of a wish to store a block."""

    OVER_QUOTA = 0
    CHARGED = 1
    BELIEVED_STORED = 2


@dataclass(frozen=True, slots=True)
class Charge:
    """One block in the books. `raw` is the entry as read, to change it only if nobody else has."""

    key: bytes
    num_bytes: int
    writers: int
    stored: bool
    deadline_ms: int
    raw: bytes


def check_namespace(namespace: str) -> str:
    """The namespace itself. Raises ValueError when it is not a name."""
    if not _NAME.fullmatch(namespace):
        raise ValueError(
            f"namespace must be 1 to 128 of A-Z a-z 0-9 _ : - and, not first, a dot; not {namespace!r}"
        )
    return namespace


class Books:
    """For threads: workers and the keeper."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._asked: set[str] = set()
        """Namespaces whose lookups were counted here; they are listed even if nothing was ever written to them."""

    def admit(
        self, namespace: str, blocks: Sequence[tuple[bytes, int]], *, also_stored: bool = False
    ) -> list[Admission]:
        """Charge blocks of `(key, num_bytes)` that are to be stored, as far as the quota goes."""
        args: list[bytes | int] = [round(WRITE_TIMEOUT_S * 1000), int(also_stored)]
        for key, num_bytes in blocks:
            args += [key, num_bytes]
        known, *answers = self._connection.run(scripts.ADMIT, _keys(namespace)[:2], args)
        if not known:
            self._connection.call("SADD", NAMESPACES, namespace)
        return [Admission(answer) for answer in answers]

    def settle(
        self, namespace: str, outcome: Mapping[bytes, bool], counts: Mapping[str, int] | None = None
    ) -> list[bytes]:
        """Say which charged blocks were stored; the others are refunded. Adds counts to the account.

        The keys whose charge is gone, because this writer was taken for dead: they must be deleted again.
        """
        counts = {name: more for name, more in (counts or {}).items() if more}
        args: list[bytes | str | int] = [len(counts)]
        for name, more in counts.items():
            args += [name, more]
        for key, stored in outcome.items():
            args += [key, int(stored)]
        answers = self._connection.run(scripts.SETTLE, _settled(namespace), args)
        return [key for key, known in zip(outcome, answers, strict=True) if not known]

    def note_lookup(self, namespace: str, *, queries: int, hits: int, missing: bytes | None) -> str | None:
        """Count a lookup; why the first missing block missed: `never_seen`, `evicted` or `damaged`."""
        if namespace not in self._asked:
            self._connection.call("SADD", NAMESPACES, namespace)
            self._asked.add(namespace)
        reason = self._connection.run(
            scripts.NOTE_LOOKUP, _keys(namespace)[:3], [queries, hits, missing or b""]
        )
        return reason.decode() or None

    def note_other_namespace(self, namespace: str) -> str:
        """The block last counted as never seen is there, but written by others: the reason that is right."""
        account = _keys(namespace)[1]
        self._connection.call_many(
            [
                ("HINCRBY", account, f"miss_{NEVER_SEEN}", -1),
                ("HINCRBY", account, f"miss_{OTHER_NAMESPACE}", 1),
            ]
        )
        return OTHER_NAMESPACE

    def forget(self, namespace: str, reason: str, blocks: Mapping[bytes, bytes]) -> int:
        """Refund blocks that are no more; `blocks`: the entry as read, or empty for any, by key. How many were."""
        if not blocks:
            return 0
        args: list[bytes | str | int] = [reason, MAX_REMEMBERED]
        for key, raw in blocks.items():
            args += [key, raw]
        return sum(self._connection.run(scripts.FORGET, _forgotten(namespace), args))

    def note_fetch(self, namespace: str, keys: Sequence[bytes], counts: Mapping[str, int]) -> None:
        """Count a fetch and mark its blocks as used now."""
        _, account, _, _, used, _ = _keys(namespace)
        args: list[bytes | str | int] = [len(counts)]
        for name, more in counts.items():
            args += [name, more]
        self._connection.run(scripts.NOTE_FETCH, [account, used], [*args, *keys])

    def oldest(self, namespace: str, most: int) -> list[tuple[int, Charge]]:
        """The least recently used blocks, first the oldest, each with the microsecond of its last use."""
        charges, _, _, _, used, _ = _keys(namespace)
        flat = self._connection.run(scripts.OLDEST, [charges, used], [most])
        return [
            (int(float(used_at)), _charge(key, raw))
            for key, used_at, raw in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        ]

    def take_fresh(self, namespace: str, most: int) -> list[bytes]:
        """Keys of blocks stored lately, each once; for the disk tier."""
        return list(self._connection.run(scripts.TAKE, [_keys(namespace)[3]], [most]))

    def want(self, namespace: str, keys: Sequence[bytes]) -> None:
        """Ask the keeper to bring blocks back from disk."""
        if keys:
            wanted = _keys(namespace)[5]
            self._connection.call_many(
                [
                    ("RPUSH", wanted, *keys),
                    ("LTRIM", wanted, -MAX_WANTED, -1),
                    ("SADD", NAMESPACES, namespace),
                ]
            )

    def take_wanted(self, namespace: str, most: int) -> list[bytes]:
        """Keys of blocks to bring back from disk."""
        return list(self._connection.run(scripts.TAKE, [_keys(namespace)[5]], [most]))

    def usage(self, namespace: str) -> tuple[int, int | None]:
        """Bytes charged and the quota."""
        used, quota = self._connection.call("HMGET", _keys(namespace)[1], "used_bytes", "quota_bytes")
        return int(used or 0), None if quota is None else int(quota)

    def imbalance(self, namespace: str) -> int:
        """The account less the sum of its charges: 0 in good books."""
        return int(self._connection.run(scripts.IMBALANCE, _keys(namespace)[:2]))

    def now_ms(self) -> int:
        """Redis's clock."""
        return int(self._connection.run(scripts.NOW_MS, [NAMESPACES]))

    def note_lost(self, namespace: str, num_blocks: int) -> None:
        """Count blocks that left DRAM before they were on disk."""
        if num_blocks:
            self._connection.call("HINCRBY", _keys(namespace)[1], "lost", num_blocks)

    def backlog(self, namespace: str) -> int:
        """Blocks stored lately that are not yet on disk."""
        return int(self._connection.call("LLEN", _keys(namespace)[3]))

    def note_disk(self, **counts: int) -> None:
        """The disk tier's figures, for the statistics."""
        words = [word for name, count in counts.items() for word in (name, count)]
        self._connection.call("HSET", DISK, *words)

    def note_audit(self, found: Mapping[str, int], *, high_watermark: float, watermark_step: float) -> None:
        """What the keeper's audit found, for the statistics, and by which marks it evicts."""
        marks = ("high_permille", round(high_watermark * 1000), "step_permille", round(watermark_step * 1000))
        last = [word for name, count in found.items() for word in (f"last_{name}", count)]
        self._connection.call_many(
            [
                ("HSET", KEEPER, "audited_ms", self.now_ms(), *marks, *last),
                ("HINCRBY", KEEPER, "audits", 1),
                *(("HINCRBY", KEEPER, f"total_{name}", count) for name, count in found.items() if count),
            ]
        )

    def charges(self, namespace: str) -> list[Charge]:
        """All entries of a namespace."""
        flat = self._connection.call("HGETALL", _keys(namespace)[0])
        pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        return [_charge(key, raw) for key, raw in pairs]

    def set_quota(self, namespace: str, quota_bytes: int | None, *, only_if_none: bool = False) -> None:
        """Limit a namespace's blocks; None: no limit. What is over a new quota is evicted by the keeper."""
        if quota_bytes is not None and quota_bytes < 0:
            raise ValueError(f"quota_bytes must not be negative, not {quota_bytes}")
        account = _keys(check_namespace(namespace))[1]
        if quota_bytes is None:
            self._connection.call("HDEL", account, "quota_bytes")
        else:
            self._connection.call("HSETNX" if only_if_none else "HSET", account, "quota_bytes", quota_bytes)
        self._connection.call("SADD", NAMESPACES, namespace)

    def quotas(self) -> dict[str, int]:
        """The quotas there are, by namespace."""
        found = {namespace: self.usage(namespace)[1] for namespace in self.namespaces()}
        return {namespace: quota for namespace, quota in found.items() if quota is not None}

    def is_new(self) -> bool:
        """Whether this Redis came up empty and `note_kept` was not called since."""
        return not self._connection.call("EXISTS", KEPT)

    def note_kept(self) -> None:
        """What was known of a Redis before this one has been restored."""
        self._connection.call("SET", KEPT, 1)

    def close_account(self, namespace: str) -> None:
        """Forget a namespace whose blocks are gone, its quota and counts with it."""
        for name in _keys(namespace):
            self._connection.call("UNLINK", name)
        self._connection.call("SREM", NAMESPACES, namespace)

    def namespaces(self) -> list[str]:
        """Every namespace ever written to."""
        return sorted(name.decode() for name in self._connection.call("SMEMBERS", NAMESPACES))

    def statistics(self) -> PoolStatistics:
        """What the pool holds and did."""
        each: dict[str, NamespaceStatistics] = {}
        for namespace in self.namespaces():
            charges, account, *_ = _keys(namespace)
            answer = self._connection.call("HGETALL", account)
            each[namespace] = namespace_statistics(_counts(answer), self._connection.call("HLEN", charges))
        disk = _counts(self._connection.call("HGETALL", DISK))
        keeper = _counts(self._connection.call("HGETALL", KEEPER))
        now_ms = int(self._connection.run(scripts.NOW_MS, [NAMESPACES]))
        return _pool_statistics(each, disk, keeper_statistics(keeper, now_ms), *self._connection.memory())


async def read_statistics(connection: AsyncConnection) -> PoolStatistics:
    """What the pool holds and did, for an event loop. Raises StoreError."""
    each: dict[str, NamespaceStatistics] = {}
    for name in sorted(await connection.call("SMEMBERS", NAMESPACES)):
        charges, account, *_ = _keys(name.decode())
        answer = await connection.call("HGETALL", account)
        each[name.decode()] = namespace_statistics(_counts(answer), await connection.call("HLEN", charges))
    disk = _counts(await connection.call("HGETALL", DISK))
    keeper = _counts(await connection.call("HGETALL", KEEPER))
    now_ms = int(await connection.run(scripts.NOW_MS, [NAMESPACES]))
    return _pool_statistics(each, disk, keeper_statistics(keeper, now_ms), *await connection.memory())


def _pool_statistics(
    each: Mapping[str, NamespaceStatistics],
    disk: Mapping[str, int],
    keeper: KeeperStatistics | None,
    used: int,
    allowed: int,
) -> PoolStatistics:
    tiers = {
        "dram": TierStatistics(
            used_bytes=used,
            capacity_bytes=allowed or None,
            blocks=sum(one.blocks for one in each.values()),
            evictions=sum(one.evictions for one in each.values()),
        )
    }
    if disk:
        tiers["disk"] = TierStatistics(
            used_bytes=disk["used_bytes"],
            capacity_bytes=disk["capacity_bytes"],
            blocks=disk["blocks"],
            evictions=disk["evictions"],
            failures=disk["failures"],
            backlog=disk.get("backlog"),
            lost=sum(one.lost for one in each.values()),
            hits=sum(one.disk_hits for one in each.values()),
        )
    return PoolStatistics(available=True, namespaces=each, tiers=tiers, keeper=keeper)


def _keys(namespace: str) -> list[str]:
    return [
        f"cm:ns:{{{namespace}}}:{part}" for part in ("charges", "account", "gone", "fresh", "used", "wanted")
    ]


def _settled(namespace: str) -> list[str]:
    charges, account, _, fresh, used, _ = _keys(namespace)
    return [charges, account, fresh, used]


def _forgotten(namespace: str) -> list[str]:
    charges, account, gone, _, used, _ = _keys(namespace)
    return [charges, account, gone, used]


def _counts(answer: Mapping[bytes, bytes] | Sequence[bytes]) -> dict[str, int]:
    pairs = answer.items() if isinstance(answer, Mapping) else zip(answer[::2], answer[1::2], strict=True)
    return {name.decode(): int(value) for name, value in pairs}


def _charge(key: bytes, raw: bytes) -> Charge:
    size, writers, stored, deadline = (int(word) for word in raw.split())
    return Charge(key, size, writers, bool(stored), deadline, raw)
