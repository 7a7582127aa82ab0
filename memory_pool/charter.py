"""What was decided about the pool, quotas, shared and pinned prefixes, kept across Redis restarts.

The truth lies in Redis, where every process reads it. The keeper copies it into a file of the disk tier's folder, and
from there back into a Redis that came up empty. A decision made meanwhile wins over the copy.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from memory_pool.books import Books
from memory_pool.pins import Pin, Pins
from memory_pool.shared_prefixes import SharedPrefix, SharedPrefixes

_FILE = "charter.json"


class Charter:
    """The keeper's copy in `folder`. Verbs raise StoreError when Redis cannot be reached; a bad disk is ignored."""

    def __init__(self, folder: Path, books: Books, prefixes: SharedPrefixes, pins: Pins) -> None:
        self._path = folder / _FILE
        self._books = books
        self._prefixes = prefixes
        self._pins = pins
        self._written: dict[str, Any] | None = None

    def keep(self) -> None:
        """Restore what an emptied Redis lost, else copy what changed."""
        if self._books.is_new():
            self._restore()
            self._books.note_kept()
        now = {
            "quotas": self._books.quotas(),
            "shared_prefixes": {name: each.as_dict() for name, each in self._prefixes.all().items()},
            "pins": {pin.field: pin.encode() for pin in self._pins.all()},
        }
        if now != self._written and self._write(now):
            self._written = now

    def _restore(self) -> None:
        try:
            kept = json.loads(self._path.read_text())
            quotas = {str(name): int(quota) for name, quota in kept["quotas"].items()}
            prefixes = {n: SharedPrefix.from_dict(each) for n, each in kept["shared_prefixes"].items()}
            pins = [Pin.decode(field, value) for field, value in kept.get("pins", {}).items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        for namespace, quota in quotas.items():
            self._books.set_quota(namespace, quota, only_if_none=True)
        for name, prefix in prefixes.items():
            self._prefixes.share(name, prefix, only_if_none=True)
        for pin in pins:
            self._pins.restore(pin)

    def _write(self, what: dict[str, Any]) -> bool:
        aside = self._path.with_suffix(f".{os.getpid()}")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(what))
            aside.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            return False
        return True
