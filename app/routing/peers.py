"""What the other gateways have at the workers, so that two gateways fill them once and know the same caches.

Each gateway announces its load in Redis with a short time to live and reads the others'. The view is a fraction of a
second old: two gateways that release at the same moment may together send a little more than there is room for, which
then waits at the workers.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import msgspec

from app.admission.admission import Capacity
from memory_pool.directory import DirectoryError

log = logging.getLogger(__name__)

GROUP = "gateways"
PAUSE_S = 0.2
TTL_S = 2.0
"""After which a gateway that was killed counts no more."""
TOLD_S = 2.0
"""How long what was prefilled stays in what is announced: ten readings, so that one that fails loses nothing."""


class PrefilledBlocks(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that lie in a worker's cache since a gateway's `number`-th prefill. A gateway that misses them only
    lets their KV be fetched from the pool."""

    number: int
    worker: str
    block_keys: list[bytes]


class GatewayLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway has at the workers: released sequences and uncomputed prompt tokens, and requests that wait.

    `workers`: by id, sequences under way there and prompt tokens sent there that are not computed.
    """

    sequences: int
    prompt_tokens: int
    queued: int
    workers: dict[str, tuple[int, int]]
    prefilled: list[PrefilledBlocks] = []


class PeerDirectory(Protocol):
    """The part of `memory_pool.directory.AsyncDirectory` that is used here."""

    async def announce(self, member_id: str, record: bytes, ttl_s: float) -> None:
        """Raises DirectoryError when Redis is away, as the others do."""

    async def withdraw(self, member_id: str) -> None:
        """Be forgotten at once."""

    async def members(self) -> dict[str, bytes]:
        """Everybody's record by id."""


class Peers:
    """Tells the other gateways what `load` says and keeps what they say. One event loop."""

    def __init__(self, directory: PeerDirectory | None, own_id: str) -> None:
        self._directory = directory
        self._own_id = own_id
        self._read_at = -math.inf
        self._decoder = msgspec.msgpack.Decoder(GatewayLoad)
        self.others: dict[str, GatewayLoad] = {}
        self.load: Callable[[], GatewayLoad] | None = None
        """This gateway's own, set by whoever knows it."""
        self.learn: Callable[[str, Sequence[bytes]], None] = lambda *_: None
        """Takes what the others prefilled: a worker and the keys of blocks in its cache."""
        self._told: deque[tuple[float, PrefilledBlocks]] = deque()
        self._num_told = 0
        self._num_learnt: dict[str, int] = {}

    def capacity(self, whole: Capacity) -> Capacity:
        """What of the workers is left for this gateway: `whole` and what the others have of it."""
        if not self.others:
            return whole
        loads = self.others.values()
        return replace(
            whole,
            others_sequences=sum(load.sequences for load in loads),
            others_prompt_tokens=sum(load.prompt_tokens for load in loads),
            num_rivals=sum(bool(load.sequences or load.queued) for load in loads),
        )

    def at_worker(self, worker_id: str) -> tuple[int, int]:
        """Sequences and uncomputed prompt tokens that the others have at a worker."""
        rows = [load.workers.get(worker_id, (0, 0)) for load in self.others.values()]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def tell(self, worker_id: str, block_keys: Sequence[bytes]) -> None:
        """Let the others know at the next turn that these blocks lie in the worker's cache."""
        if self._directory is None:
            return
        self._num_told += 1
        blocks = PrefilledBlocks(self._num_told, worker_id, list(block_keys))
        self._told.append((time.monotonic(), blocks))

    async def run(self) -> None:
        """Tell and listen until cancelled."""
        if self._directory is None or self.load is None:
            return
        try:
            while True:
                await self.turn(self._directory, self.load())
                await asyncio.sleep(PAUSE_S)
        finally:
            try:
                await self._directory.withdraw(self._own_id)
            except DirectoryError:
                log.info("Redis is away: this gateway is forgotten in %g s", TTL_S)

    async def turn(self, directory: PeerDirectory, own: GatewayLoad) -> None:
        """Tell once and listen once."""
        while self._told and time.monotonic() - self._told[0][0] > TOLD_S:
            self._told.popleft()
        own = msgspec.structs.replace(own, prefilled=[blocks for _, blocks in self._told])
        try:
            await directory.announce(self._own_id, msgspec.msgpack.encode(own), TTL_S)
            members = await directory.members()
        except DirectoryError:
            if time.monotonic() - self._read_at > TTL_S:
                self.others = {}
            return
        self._read_at = time.monotonic()
        self.others = {
            member: load
            for member, record in members.items()
            if member != self._own_id and (load := self._decode(record)) is not None
        }
        self._num_learnt = {member: self._num_learnt.get(member, 0) for member in self.others}
        for member, load in self.others.items():
            for blocks in load.prefilled:
                if blocks.number > self._num_learnt[member]:
                    self._num_learnt[member] = blocks.number
                    self.learn(blocks.worker, blocks.block_keys)

    def _decode(self, record: bytes) -> GatewayLoad | None:
        try:
            return self._decoder.decode(record)
        except msgspec.DecodeError:
            return None  # of another version of this program
