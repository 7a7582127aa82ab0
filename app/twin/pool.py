"""The pool of the twin: which blocks it holds, decided by the live pool's eviction code."""

from collections.abc import Sequence

from app.twin.trace import BLOCK_TOKENS, Request
from memory_pool.eviction import LruIndex


class TwinPool:
    """Blocks by name with a limit in bytes (None: unlimited), least recently used out first."""

    def __init__(self, block_bytes: int, capacity_bytes: float | None) -> None:
        self.block_bytes = block_bytes
        self.capacity_bytes = capacity_bytes
        self.num_evicted = 0
        self._index: LruIndex[int] = LruIndex()

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks held."""
        return self._index.used_bytes

    def lookup(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are here; they count as used."""
        for count, block in enumerate(blocks):
            if not self._index.touch(block):
                return count
        return len(blocks)

    def publish(self, blocks: Sequence[int], now: float) -> None:
        """Hold these blocks, at the cost of the least recently used."""
        for block in blocks:
            if not self._index.touch(block):
                self._index.insert(block, self.block_bytes)
        if self.capacity_bytes is None:
            return
        excess = self._index.used_bytes - self.capacity_bytes
        if excess > 0:
            for block in self._index.victims(int(excess), now):
                self._index.remove(block)
                self.num_evicted += 1


def ideal_hit_share(requests: Sequence[Request], block_bytes: int, capacity_bytes: float | None) -> float:
    """Share of prompt tokens that a pool of this size would have held, were every prompt computed on arrival."""
    pool = TwinPool(block_bytes, capacity_bytes)
    hit = 0
    for request in requests:
        hit += min(pool.lookup(request.blocks) * BLOCK_TOKENS, request.prompt_tokens)
        pool.publish(request.blocks, request.arrival_s)
    total = sum(request.prompt_tokens for request in requests)
    return hit / total


def hit_curve(
    requests: Sequence[Request], block_bytes: int, capacities: Sequence[float]
) -> list[tuple[float, float]]:
    """(capacity in bytes, ideal hit share) for each capacity."""
    return [(capacity, ideal_hit_share(requests, block_bytes, capacity)) for capacity in capacities]
