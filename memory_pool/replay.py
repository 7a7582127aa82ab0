"""What the tiers are worth: a real trace played through a real pool whose DRAM is small.

`cloudmatrix pool replay` reads Mooncake JSONL (`hash_ids`, one per block of 512 tokens) and shows the share of prompt
blocks found with DRAM alone, with the disk tier below it, and what an infinite cache would have found. Blocks are
scaled down to a few kilobytes: the shares depend on how many fit, not on their size.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from memory_pool.block import BlockFormat
from memory_pool.client import FetchItem, PoolClient, PutItem
from memory_pool.connection import Connection
from memory_pool.disk_tier import DiskReader, DiskTier
from memory_pool.keeper import Keeper
from memory_pool.redis_server import start_redis

PAYLOAD_BYTES = 8192

_FORMAT = BlockFormat(
    fingerprint="replay",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    block_tokens=1,
    payload_bytes=PAYLOAD_BYTES,
)
_PER_BLOCK_BYTES = 10_240
"""What Redis takes for one such block: its allocator's size class, the key, and its entries in the books."""


def read_chains(path: Path, num_requests: int) -> list[list[int]]:
    """The block ids of each request. Raises ValueError when a line is not Mooncake's."""
    chains: list[list[int]] = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if len(chains) == num_requests:
                break
            try:
                chains.append([int(block) for block in json.loads(line)["hash_ids"]])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a request with `hash_ids`") from error
    return chains


def ideal_share(chains: Sequence[Sequence[int]]) -> float:
    """What a cache that loses nothing would find."""
    seen: set[int] = set()
    found = total = 0
    for chain in chains:
        for block in chain:
            if block not in seen:
                break
            found += 1
        total += len(chain)
        seen.update(chain)
    return found / max(1, total)


def num_distinct(chains: Sequence[Sequence[int]]) -> int:
    """How many blocks a cache that loses nothing would hold in the end."""
    return len({block for chain in chains for block in chain})


def replay(
    chains: Sequence[Sequence[int]],
    *,
    dram_blocks: int,
    disk_blocks: int,
    played: Callable[[], None] | None = None,
) -> tuple[float, int]:
    """Share of blocks found by a real pool with so much DRAM and disk (0: none), and how many had other bytes.

    `played` is called after every request.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        server = start_redis(folder / "redis", maxmemory_bytes=1 << 30)
        stack.callback(server.stop)
        with contextlib.closing(Connection(server.url)) as connection:
            # The keeper holds DRAM below its high mark, 90 %.
            limit = connection.memory()[0] + round(dram_blocks * _PER_BLOCK_BYTES / 0.9)
            connection.call("CONFIG", "SET", "maxmemory", limit)
        value_bytes = _FORMAT.value_bytes(1)
        disk = DiskTier(folder / "kv", disk_blocks * value_bytes) if disk_blocks else None
        reader = DiskReader(folder / "kv") if disk_blocks else None
        keeper = stack.enter_context(contextlib.closing(Keeper(server.url, disk=disk)))
        client = stack.enter_context(contextlib.closing(PoolClient(server.url, _FORMAT, disk=reader)))
        return _play(client, keeper, chains, played)


def _play(
    client: PoolClient, keeper: Keeper, chains: Sequence[Sequence[int]], played: Callable[[], None] | None
) -> tuple[float, int]:
    found = wrong = total = 0
    for chain in chains:
        keys = [hashlib.sha256(b"block %d" % block).digest() for block in chain]
        payloads = [hashlib.sha256(key).digest() * (PAYLOAD_BYTES // 32) for key in keys]
        count = client.lookup(keys)
        items = [
            FetchItem(key, [block], memoryview(bytearray(PAYLOAD_BYTES)))
            for key, block in zip(keys[:count], chain, strict=False)
        ]
        whole = True
        for item, payload, result in zip(items, payloads, client.fetch(items), strict=False):
            whole = whole and result.ok
            found += whole
            wrong += result.ok and item.into != payload
        client.publish(
            [PutItem(k, [b], memoryview(p)) for k, b, p in zip(keys, chain, payloads, strict=True)]
        )
        # A live service makes some hundred blocks a second at most: the keeper is never behind by more than a request.
        keeper.run_pass()
        total += len(chain)
        if played is not None:
            played()
    return found / max(1, total), wrong
