"""Store: bytes by key. Values are written from and read into the caller's buffers, so nothing is copied on the way.

A store is shared by threads. It keeps a value whole or not at all and never changes one, except by `replace`. Any
verb raises `StoreError` when the store cannot be reached or refuses; what had been done until then stays done.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from memory_pool.lease import LeaseTable
from memory_pool.target import Checked, Target

Buffer = bytes | bytearray | memoryview


class StoreError(Exception):
    """The store cannot be reached, timed out or refused."""


class StoreFullError(StoreError):
    """The store has no memory for a write; reads go on."""


@dataclass(frozen=True, slots=True)
class Get:
    """Read the value of `key`, scattered over `into`; the buffers' total is the length expected."""

    key: bytes
    into: Sequence[Target]


@dataclass(frozen=True, slots=True)
class Put:
    """Store the concatenation of parts for `ttl_s` seconds; what is there already stays, unless `replace`.

    `parts`, `num_bytes` together, is called when the value is about to be sent, and each part asked for when the one
    before is on its way, so that preparing overlaps with storing.
    """

    key: bytes
    num_bytes: int
    parts: Callable[[], Iterable[Buffer]]
    ttl_s: float
    replace: bool = False


class Store(Protocol):
    """Keys are names of `keys.py`: 32 bytes."""

    def get_many(self, gets: Sequence[Get]) -> list[int | None]:
        """The length of each value, None where there is none.

        Buffers are filled only where the length fits them; otherwise they hold garbage.
        """
        ...

    def put_many(self, puts: Sequence[Put]) -> list[bool]:
        """True where the value is there now; False where it is not, because the store has no room."""
        ...

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """How many leading keys have a value."""
        ...

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each key has a value."""
        ...

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove values; how many there were."""
        ...

    def lease(self, keys: Sequence[bytes], holder: str, ttl_s: float) -> int:
        """Hold leading values against eviction until released or `ttl_s` is over; how many are there and held."""
        ...

    def release(self, keys: Sequence[bytes], holder: str, ttl_s: float) -> None:
        """End the holder's leases; a value nobody holds any more has `ttl_s` to live."""
        ...

    def evict(self, keys: Sequence[bytes], *, even_pinned: bool = False) -> list[bool]:
        """Remove values unless they are held (`even_pinned`: by more than a pin); True where one was removed."""
        ...

    def close(self) -> None:
        """Release connections. Idempotent."""
        ...


class MemoryStore:
    """A store in this process, for one-process use and tests. `capacity_bytes` None: no limit; `clock` in seconds."""

    def __init__(
        self, *, capacity_bytes: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._values: dict[bytes, tuple[bytes, float]] = {}
        self._used_bytes = 0
        self._leases = LeaseTable()

    def get_many(self, gets: Sequence[Get]) -> list[int | None]:
        """See Store."""
        lengths: list[int | None] = []
        for get in gets:
            with self._lock:
                value = self._live(get.key)
            lengths.append(None if value is None else len(value))
            if value is not None and len(value) == sum(len(part) for part in get.into):
                at = 0
                for part in get.into:
                    view = part.view if isinstance(part, Checked) else part
                    view[:] = value[at : at + len(view)]
                    at += len(view)
                    if isinstance(part, Checked):
                        part.digest.reset()
                        part.digest.update(view)
        return lengths

    def put_many(self, puts: Sequence[Put]) -> list[bool]:
        """See Store."""
        return [self._put(put) for put in puts]

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        present = self.exists(keys)
        return present.index(False) if False in present else len(present)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See Store."""
        with self._lock:
            return [self._live(key) is not None for key in keys]

    def delete(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        with self._lock:
            return sum(self._live(key) is not None and self._drop(key) for key in keys)

    def lease(self, keys: Sequence[bytes], holder: str, ttl_s: float) -> int:
        """See Store."""
        with self._lock:
            for count, key in enumerate(keys):
                value = self._live(key)
                if value is None:
                    return count
                self._leases.lease(key, holder, self._clock() + ttl_s)
                self._values[key] = (value, math.inf)
            return len(keys)

    def release(self, keys: Sequence[bytes], holder: str, ttl_s: float) -> None:
        """See Store."""
        with self._lock:
            for key in keys:
                self._leases.release(key, holder)
                value = self._live(key)
                if value is not None and not self._leases.is_leased(key, self._clock()):
                    self._values[key] = (value, self._clock() + ttl_s)

    def evict(self, keys: Sequence[bytes], *, even_pinned: bool = False) -> list[bool]:
        """See Store."""
        with self._lock:
            now = self._clock()
            return [
                not self._leases.is_leased(key, now, but_pins=even_pinned)
                and self._live(key) is not None
                and self._drop(key)
                for key in keys
            ]

    def close(self) -> None:
        """See Store."""

    def _put(self, put: Put) -> bool:
        value = b"".join(put.parts())
        with self._lock:
            if self._live(put.key) is not None:
                if not put.replace:
                    return True
                self._drop(put.key)
            if self._capacity_bytes is not None and self._used_bytes + len(value) > self._capacity_bytes:
                return False
            self._values[put.key] = (value, self._clock() + put.ttl_s)
            self._used_bytes += len(value)
            return True

    def _live(self, key: bytes) -> bytes | None:
        value, expires_at = self._values.get(key, (None, 0.0))
        if value is not None and expires_at <= self._clock():
            self._drop(key)
            return None
        return value

    def _drop(self, key: bytes) -> bool:
        self._used_bytes -= len(self._values.pop(key)[0])
        return True


class NoStore:
    """A pool that is switched off: it has nothing, takes nothing and costs nothing."""

    def get_many(self, gets: Sequence[Get]) -> list[int | None]:
        """See Store."""
        return [None] * len(gets)

    def put_many(self, puts: Sequence[Put]) -> list[bool]:
        """See Store."""
        return [False] * len(puts)

    def count_prefix(self, _keys: Sequence[bytes]) -> int:
        """See Store."""
        return 0

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See Store."""
        return [False] * len(keys)

    def delete(self, _keys: Sequence[bytes]) -> int:
        """See Store."""
        return 0

    def lease(self, _keys: Sequence[bytes], _holder: str, _ttl_s: float) -> int:
        """See Store."""
        return 0

    def release(self, _keys: Sequence[bytes], _holder: str, _ttl_s: float) -> None:
        """See Store."""

    def evict(self, keys: Sequence[bytes], *, even_pinned: bool = False) -> list[bool]:  # noqa: ARG002 - the verb's
        """See Store."""
        return [False] * len(keys)

    def close(self) -> None:
        """See Store."""
