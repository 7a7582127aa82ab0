"""The terminal tables of `cloudmatrix pool stats` and `inspect`."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def pool_tables(found: Mapping[str, Any]) -> RenderableType:
    """Everything that `PoolStatistics.as_dict` says."""
    tiers = _table("tier", "used", "capacity", "blocks", "evicted", "hits", "failed", "waiting", "lost")
    for name, tier in found["tiers"].items():
        numbers = ("blocks", "evictions", "hits", "failures", "backlog", "lost")
        tiers.add_row(
            name,
            size(tier["used_bytes"]),
            size(tier["capacity_bytes"]),
            *(count(tier[number]) for number in numbers),
        )
    namespaces = _table(
        "namespace", "used", "quota", "blocks", "asked", "found", "published", "evicted", "damaged"
    )
    for name, each in found["namespaces"].items():
        namespaces.add_row(
            name,
            size(each["used_bytes"]),
            size(each["quota_bytes"]),
            *(count(each[number]) for number in ("blocks", "queries")),
            share(each["hits"], each["queries"]),
            *(count(each[number]) for number in ("published", "evictions", "damaged")),
        )
    misses = _list(found["misses"])
    dropped: dict[str, int] = {}
    for each in found["namespaces"].values():
        for reason, number in each["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    lines = [
        f"prefixes ended early: {misses}",
        f"publishes refused: {_list(dropped)}",
        _audit(found["keeper"]),
    ]
    return Group(tiers, namespaces, *map(Text, lines))


def block_table(namespace: str, blocks: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The blocks of a namespace, as `PoolAdmin.inspect` lists them."""
    table = _table("block", "size", "where", "state", "held", "idle", "expires")
    for block in blocks:
        tiers = [name for name, there in (("DRAM", block["in_dram"]), ("disk", block["on_disk"])) if there]
        state = "stored" if block["stored"] else "being written"
        held = "pinned" if block["is_pinned"] else count(block["holders"] or None)
        table.add_row(
            block["key"],
            size(block["num_bytes"]),
            "+".join(tiers) or "nowhere",
            state,
            held,
            seconds(block["idle_s"]),
            seconds(block["ttl_s"]),
        )
    table.title = f"{namespace}: used last, first"
    return table


def size(num_bytes: int | None) -> str:
    """Bytes for people."""
    if num_bytes is None:
        return "–"
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes} B"


def count(number: int | None) -> str:
    """A count; unknown is a dash."""
    return "–" if number is None else f"{number:,}"


def share(part: int, whole: int) -> str:
    """A part of something; of nothing it is unknown."""
    return f"{part / whole:.1%}" if whole else "–"


def seconds(value: float | None) -> str:
    """Seconds for people."""
    if value is None:
        return "–"
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * scale:
            return f"{value / scale:,.0f} {unit}"
    return f"{value:,.0f} s"


def _audit(keeper: Mapping[str, Any] | None) -> str:
    if keeper is None:
        return "no keeper has audited the books"
    state = "balance" if keeper["balanced"] else f"did not balance and were mended: {_list(keeper['last'])}"
    marks = f"evicts above {keeper['high_watermark']:.0%}, {keeper['watermark_step']:.0%} at a time"
    audits = f"{keeper['audits']:,} audits, the last {seconds(keeper['age_s'])} ago"
    return f"keeper: the books {state}; {audits}, mended in all: {_list(keeper['total'])}; {marks}"


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "none"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
