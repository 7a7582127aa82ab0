"""Which blocks go when room is needed: least recently used first, never one that is held. Pure: `now` is passed in.

The keeper, the disk tier and the digital twin decide with this same code.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Begin to evict when `high` of the capacity is in use, and free `step` of the capacity at a time."""

    high: float = 0.90
    step: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.high <= 1:
            raise ValueError(f"watermarks need 0 < step <= high <= 1, not {self.step} and {self.high}")

    def bytes_to_free(self, used_bytes: int, capacity_bytes: int) -> int:
        """0 below the high mark."""
        if used_bytes <= self.high * capacity_bytes:
            return 0
        return used_bytes - int((self.high - self.step) * capacity_bytes)


class LruIndex(Generic[Key]):
    """Blocks in the order of their last use, with their bytes."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[Key, int] = OrderedDict()
        self._held_until: dict[Key, float] = {}
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def insert(self, key: Key, num_bytes: int) -> None:
        """Add a block, or give a known one its new size; it is the most recently used."""
        self.remove(key)
        self._sizes[key] = num_bytes
        self.used_bytes += num_bytes

    def touch(self, key: Key) -> bool:
        """Mark a block as used now; False when it is not here."""
        if key not in self._sizes:
            return False
        self._sizes.move_to_end(key)
        return True

    def remove(self, key: Key) -> int:
        """Take a block out; its bytes, 0 when it was not here."""
        num_bytes = self._sizes.pop(key, 0)
        self._held_until.pop(key, None)
        self.used_bytes -= num_bytes
        return num_bytes

    def hold(self, key: Key, until: float) -> None:
        """Lease or pin: not to be evicted before `until`. The longest hold counts; unknown blocks are ignored."""
        if key in self._sizes:
            self._held_until[key] = max(until, self._held_until.get(key, until))

    def release(self, key: Key) -> None:
        """End a hold."""
        self._held_until.pop(key, None)

    def victims(self, num_bytes: int, now: float) -> list[Key]:
        """The least recently used blocks not held at `now` that together hold `num_bytes`, or all there are."""
        chosen: list[Key] = []
        freed = 0
        for key, size in self._sizes.items():
            if freed >= num_bytes:
                break
            if self._held_until.get(key, now) > now:
                continue
            chosen.append(key)
            freed += size
        return chosen
