"""What the pool holds and did, as `GET /api/pool` shows it. Plain values; unknown is None.

Counts are blocks. `queries` and `hits` come from workers' lookups (the gateway's prediction does not count).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NEVER_SEEN = "never_seen"
OTHER_NAMESPACE = "other_namespace"
MISS_REASONS = (NEVER_SEEN, "evicted", "damaged", OTHER_NAMESPACE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStatistics:
    """One namespace. `used_bytes` is charged against `quota_bytes` (None: no quota)."""

    blocks: int = 0
    used_bytes: int = 0
    quota_bytes: int | None = None
    queries: int = 0
    hits: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    published: int = 0
    published_bytes: int = 0
    disk_hits: int = 0
    evictions: int = 0
    lost: int = 0
    """Blocks that left DRAM before they were on disk."""
    damaged: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Publishes refused, by reason."""
    misses: Mapping[str, int] = field(default_factory=dict)
    """Lookups that ended early, by the reason of the first missing block."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatistics:
    """One tier. `capacity_bytes` None: no limit; `blocks` None: not known."""

    used_bytes: int
    capacity_bytes: int | None
    blocks: int | None
    evictions: int
    hits: int | None = None
    failures: int | None = None
    """Writes that the tier did not take."""
    backlog: int | None = None
    """Blocks waiting to be written."""
    lost: int | None = None
    """Blocks that were gone from above before they were written here."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperStatistics:
    """What the keeper's audits of the books found: `last`, `age_s` ago, and in all."""

    audits: int
    age_s: float
    high_watermark: float
    """Share of the DRAM, and of a quota, above which blocks are evicted, `watermark_step` of it at a time."""
    watermark_step: float
    last: Mapping[str, int]
    total: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "balanced": not any(count for name, count in self.last.items() if name != "expired_leases"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """The whole pool; `available` is False when it could not be asked, and everything else is then empty."""

    available: bool
    namespaces: Mapping[str, NamespaceStatistics] = field(default_factory=dict)
    tiers: Mapping[str, TierStatistics] = field(default_factory=dict)
    keeper: KeeperStatistics | None = None
    """None: no keeper has audited the books."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the totals, then per tier and per namespace."""
        totals = {
            name: sum(getattr(each, name) for each in self.namespaces.values())
            for name in ("blocks", "queries", "hits", "fetched", "published", "evictions", "damaged")
        }
        return {
            "available": self.available,
            **totals,
            "bytes": sum(each.used_bytes for each in self.namespaces.values()),
            "misses": {
                reason: sum(each.misses.get(reason, 0) for each in self.namespaces.values())
                for reason in MISS_REASONS
            },
            "tiers": {name: each.as_dict() for name, each in self.tiers.items()},
            "namespaces": {name: each.as_dict() for name, each in self.namespaces.items()},
            "keeper": None if self.keeper is None else self.keeper.as_dict(),
        }


def keeper_statistics(noted: Mapping[str, int], now_ms: int) -> KeeperStatistics | None:
    """From what the keeper noted (`books.py`)."""
    if "audited_ms" not in noted:
        return None
    last = {name.removeprefix("last_"): count for name, count in noted.items() if name.startswith("last_")}
    return KeeperStatistics(
        audits=noted["audits"],
        age_s=(now_ms - noted["audited_ms"]) / 1000,
        high_watermark=noted["high_permille"] / 1000,
        watermark_step=noted["step_permille"] / 1000,
        last=last,
        total={name: noted.get(f"total_{name}", 0) for name in last},
    )


def namespace_statistics(account: Mapping[str, int], num_blocks: int) -> NamespaceStatistics:
    """From the counts of an account (`books.py`)."""

    def starting(prefix: str) -> dict[str, int]:
        return {
            name.removeprefix(prefix): count for name, count in account.items() if name.startswith(prefix)
        }

    return NamespaceStatistics(
        blocks=num_blocks,
        used_bytes=account.get("used_bytes", 0),
        quota_bytes=account.get("quota_bytes"),
        queries=account.get("queries", 0),
        hits=account.get("hits", 0),
        fetched=account.get("fetched", 0),
        fetched_bytes=account.get("fetched_bytes", 0),
        published=account.get("published", 0),
        published_bytes=account.get("published_bytes", 0),
        disk_hits=account.get("disk_hits", 0),
        evictions=account.get("gone_evicted", 0),
        lost=account.get("lost", 0),
        damaged=account.get("gone_damaged", 0),
        dropped=starting("dropped_"),
        misses=starting("miss_"),
    )
