"""The pool of the twin: which blocks it holds, decided by the live pool's eviction and placement code."""

from collections.abc import Sequence

from app.twin.trace import BLOCK_TOKENS, Request
from fabric.topology import CPUS_PER_NODE
from memory_pool.eviction import LruIndex
from memory_pool.placement import place_of


class TwinPool:
    """Blocks by name with a limit in bytes (None: unlimited), least recently used out first.

    The DRAM belongs to servers, one per node. A lost server takes its blocks and its share of the limit along; names
    that were its own go to the next server that works.
    """

    def __init__(self, block_bytes: int, capacity_bytes: float | None, num_servers: int = 1) -> None:
        self.block_bytes = block_bytes
        self.capacity_bytes = capacity_bytes
        self.num_servers = num_servers
        self.num_evicted = 0
        self.num_lost = 0
        self._lost_servers: set[int] = set()
        self._index: LruIndex[int] = LruIndex()

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks held."""
        return self._index.used_bytes

    @property
    def num_working_servers(self) -> int:
        """Servers whose DRAM can be used."""
        return self.num_servers - len(self._lost_servers)

    def lookup(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are here; they count as used."""
        for count, block in enumerate(blocks):
            if not self._index.touch(block):
                return count
        return len(blocks)

    def publish(self, blocks: Sequence[int], now: float) -> None:
        """Hold these blocks, at the cost of the least recently used. Without a working server nothing is held."""
        if not self.num_working_servers:
            return
        for block in blocks:
            if not self._index.touch(block):
                self._index.insert(block, self.block_bytes)
        self._make_room(now)

    def lose_server(self, server: int, now: float) -> int:
        """The server's DRAM is gone; how many blocks went with it."""
        everything = self._index.victims(self._index.used_bytes, now)
        gone = [block for block in everything if self.server_of(block) == server]
        for block in gone:
            self._index.remove(block)
        self._lost_servers.add(server)
        self.num_lost += len(gone)
        self._make_room(now)
        return len(gone)

    def restore_server(self, server: int) -> None:
        """The server is back, empty. Blocks that went to its neighbour meanwhile stay there until they are evicted."""
        self._lost_servers.discard(server)

    def server_of(self, block: int) -> int:
        """The working server that holds a block of this name."""
        key = block.to_bytes(8, "little", signed=True)
        cpu = place_of(key, num_cpus=self.num_servers * CPUS_PER_NODE)
        server = int(cpu.removeprefix("cpu:")) // CPUS_PER_NODE
        while server in self._lost_servers:
            server = (server + 1) % self.num_servers
        return server

    def _make_room(self, now: float) -> None:
        if self.capacity_bytes is None:
            return
        capacity_bytes = self.capacity_bytes * self.num_working_servers / self.num_servers
        excess = self._index.used_bytes - capacity_bytes
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
