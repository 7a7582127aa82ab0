"""Fetch or recompute: how many of the blocks that the pool has are worth fetching, by predicted seconds.

    fetching k blocks   latency + bytes of k blocks / rate          learned from the lookups and fetches of this worker
    computing a block   the engine's step-time model                learned from its steps

Blocks depend on all before them, so the choice is a number of leading blocks. The decision is pure; what it is made
from is learned by `FetchTime`, which forgets: a pool that was slow is tried again after a while.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY_S = 10.0
"""How long a fetch is a guide to the next one."""
NUM_REMEMBERED = 3
"""Fetches that must have been slow, one after the other, before a pool is thought slow."""


@dataclass(frozen=True, slots=True)
class FetchEstimate:
    """What a fetch takes: `latency_s` whatever its size, and then its bytes at `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """Of one fetch of so many bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Choice:
    """Fetch the first `num_blocks`. The predictions are for all blocks that could be fetched, one way and the other.

    `fetch_s` None: nothing is known of the pool's speed, and so it is tried.
    """

    num_blocks: int
    fetch_s: float | None
    compute_s: float


def choose(compute_s: Sequence[float], block_bytes: int, estimate: FetchEstimate | None) -> Choice:
    """How many leading blocks to fetch so that all are there soonest; `compute_s[i]` is what computing block i takes.

    Fetching k and computing the others takes `estimate.seconds(k · block_bytes) + sum(compute_s[k:])`, without the
    latency where k is 0. Of equal choices the one that computes less is taken.
    """
    total_s = sum(compute_s)
    if estimate is None or not compute_s:
        return Choice(len(compute_s), None, total_s)
    best, best_s = 0, total_s
    left_s = total_s
    for index, seconds in enumerate(compute_s):
        left_s -= seconds
        both_s = estimate.seconds((index + 1) * block_bytes) + left_s
        if both_s <= best_s:
            best, best_s = index + 1, both_s
    return Choice(best, estimate.seconds(len(compute_s) * block_bytes), total_s)


class FetchTime:
    """What fetches take here and now: as long as the fastest of the last few, for one may be slow by chance.

    Thread-safe; instants are the caller's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookups: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._fetches: deque[tuple[float, int, float]] = deque(maxlen=NUM_REMEMBERED)

    def looked_up(self, seconds: float) -> None:
        """A lookup, which moves no bytes, took so long."""
        with self._lock:
            self._lookups.append(seconds)

    def fetched(self, num_bytes: int, seconds: float, now: float) -> None:
        """So many bytes came in `seconds`."""
        if num_bytes > 0:
            with self._lock:
                self._fetches.append((now, num_bytes, seconds))

    def estimate(self, now: float) -> FetchEstimate | None:
        """What a fetch would take; None when too few were made lately to say."""
        with self._lock:
            while self._fetches and now - self._fetches[0][0] > MEMORY_S:
                self._fetches.popleft()
            if len(self._fetches) < NUM_REMEMBERED:
                return None
            latency_s = min(self._lookups, default=0.0)
            return FetchEstimate(
                latency_s,
                max(num_bytes / max(seconds - latency_s, 1e-6) for _, num_bytes, seconds in self._fetches),
            )
