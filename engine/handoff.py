"""A sequence's KV out to the pool and in from it, beside the engine's steps.

The engine thread asks (`load`, `prefetch`, `publish`, `publish_tail`) and later takes the finished `Job` back
(`finish`); in between an IO thread moves bytes between the pool and the memory of local blocks. A job holds the blocks
it reads or writes, so that whatever becomes of its sequence, nobody else gets them before the last byte has moved.

    asked -> in an IO thread -> done, in the engine's inbox -> finish() -> blocks named and released
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.block_manager import BlockManager
from engine.protocol import Prefetch
from engine.sequence import Sequence, Status
from fabric.ledger import Transfer, price
from memory_pool.client import DEFAULT_TAIL_TTL_S, FetchItem, FetchResult, PutItem, PutResult
from memory_pool.keys import namespace_at, tail_key

log = logging.getLogger(__name__)

Identity = tuple[str, str]
Direction = Literal["in", "out"]

MAX_PREFETCHED_REQUESTS = 4096
"""Requests whose blocks were prefetched and that have not come yet; beyond it the oldest is forgotten."""


class Pool(Protocol):
    """What is needed of `memory_pool.client.PoolClient`."""

    def lookup(self, keys: Items[bytes], namespace: str, /) -> int:
        """How many leading blocks are in the pool."""

    def fetch(self, items: Items[FetchItem], /) -> list[FetchResult]:
        """Read blocks into local memory."""

    def publish(self, items: Items[PutItem], /) -> list[PutResult]:
        """Store blocks."""

    def delete(self, keys: Items[bytes], /) -> int:
        """Remove blocks."""

    def place_of(self, key: bytes, /) -> str:
        """The place of the supernode that a block lives in."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One block to move: its name, its tokens and the local block. `index`: which block of the sequence it is."""

    key: bytes
    tokens: list[int]
    block: int
    index: int
    namespace: str


@dataclass(slots=True, eq=False)
class Job:
    """Blocks that move together for one sequence, or for a request that is still to come (`sequence` None).

    `certain` are expected in the pool, `possible` are looked up first; `tail` is the partly filled last block. An IO
    thread fills in what came of it: `moved` are the parcels whose bytes are where they should be.
    """

    direction: Direction
    identity: Identity
    sequence: Sequence | None
    certain: list[Parcel] = field(default_factory=list)
    possible: list[Parcel] = field(default_factory=list)
    tail: Parcel | None = None
    num_looked_up: int = 0
    looked_up_at: float | None = None
    moved: list[Parcel] = field(default_factory=list)
    num_failed: int = 0
    transfers: list[Transfer] = field(default_factory=list)

    def parcels(self) -> Iterator[Parcel]:
        """All of them, the tail last."""
        yield from self.certain
        yield from self.possible
        if self.tail is not None:
            yield self.tail


class Handoff:
    """KV traffic of one worker at `place`. Methods are for the engine thread; `done` takes finished jobs from any.

    `memory(block)` is the local memory of a block; `clock` gives the instants of the timelines.
    """

    def __init__(
        self,
        pool: Pool,
        blocks: BlockManager,
        memory: Callable[[int], memoryview],
        *,
        place: str,
        done: Callable[[Job], None],
        clock: Callable[[], float],
        num_threads: int = 2,
    ) -> None:
        self._pool = pool
        self._blocks = blocks
        self._memory = memory
        self._place = place
        self._done = done
        self._clock = clock
        # Reads have their own threads: a sequence that waits for its KV must not queue behind publishes.
        self._threads = {
            "in": ThreadPoolExecutor(num_threads, thread_name_prefix="kv-in"),
            "out": ThreadPoolExecutor(num_threads, thread_name_prefix="kv-out"),
        }
        self._jobs: set[Job] = set()
        self.arriving: set[bytes] = set()
        """Names of blocks on their way in."""
        self._leaving: dict[bytes, list[Sequence]] = {}
        """Names of full blocks on their way out, and who waits for each."""
        self._prefetched: dict[Identity, list[Transfer]] = {}

    @property
    def num_jobs(self) -> int:
        """Jobs not yet finished."""
        return len(self._jobs)

    def holdings(self) -> list[list[int]]:
        """The blocks that each unfinished job holds, for the integrity check."""
        return [[parcel.block for parcel in job.parcels()] for job in self._jobs]

    def load(self, sequence: Sequence) -> bool:
        """Bring in KV of an admitted sequence's blocks behind `num_computed`; False when the pool can have none."""
        block_tokens = self._blocks.block_tokens
        first = sequence.num_computed // block_tokens
        last = (sequence.num_tokens - 1) // block_tokens
        handoff = sequence.handoff
        num_certain, tail = first, None
        if handoff is not None:
            while (
                num_certain < min(last, len(handoff.block_keys))
                and handoff.block_keys[num_certain] == sequence.keys[num_certain]
            ):
                num_certain += 1
            begin = len(handoff.block_keys) * block_tokens
            # The tail helps only where it follows the blocks named, and only if it holds what it says.
            whole = handoff.block_keys == sequence.keys[: len(handoff.block_keys)]
            index = len(handoff.block_keys)
            fits = first <= index and begin < handoff.num_tokens <= sequence.num_tokens
            if handoff.tail_key and whole and fits:
                tail = Parcel(
                    handoff.tail_key,
                    sequence.tokens[begin : handoff.num_tokens],
                    sequence.blocks[index],
                    index,
                    sequence.namespace,
                )
        job = Job("in", sequence.identity, sequence, tail=tail)
        job.certain = [self._parcel(sequence, index) for index in range(first, num_certain)]
        beyond = num_certain + (1 if tail is not None else 0)
        job.possible = [self._parcel(sequence, index) for index in range(max(num_certain, beyond), last)]
        if not job.certain and not job.possible and tail is None:
            return False
        self._send(job)
        return True

    def prefetch(self, identity: Identity, wanted: Prefetch) -> None:
        """Bring in full blocks for a request that is still to come, as far as there is room to spare."""
        block_tokens = self._blocks.block_tokens
        job = Job("in", identity, None)
        held = []
        for index, key in enumerate(wanted.block_keys):
            of_block = wanted.tokens[index * block_tokens : (index + 1) * block_tokens]
            if len(of_block) < block_tokens or key in self.arriving or self._blocks.find(key) is not None:
                continue
            if self._blocks.num_available <= self._blocks.num_blocks // 4:
                break
            held += self._blocks.allocate(1) or []
            namespace = namespace_at(
                index, namespace=wanted.namespace, num_shared_blocks=wanted.num_shared_blocks
            )
            job.certain.append(Parcel(key, of_block, held[-1], index, namespace))
        if job.certain:
            self._send(job)
            # The job holds them now; nobody else does, so that they are idle, not lost, once they are there.
            self._blocks.release(held)

    def publish(self, sequence: Sequence, indices: Items[int]) -> None:
        """Send out full, computed blocks. One that is on its way already is only waited for."""
        job = Job("out", sequence.identity, sequence)
        for index in indices:
            parcel = self._parcel(sequence, index)
            sequence.num_publishing += 1
            if parcel.key in self._leaving:
                self._leaving[parcel.key].append(sequence)
            else:
                self._leaving[parcel.key] = [sequence]
                job.certain.append(parcel)
        if job.certain:
            self._send(job)

    def publish_tail(self, sequence: Sequence, num_tokens: int) -> bytes | None:
        """Send out the partly filled block at the end of the first `num_tokens` tokens; its name, None without one."""
        index, filled = divmod(num_tokens, self._blocks.block_tokens)
        if not filled:
            return None
        key = tail_key(sequence.request_id, sequence.namespace)
        tokens = sequence.tokens[num_tokens - filled : num_tokens]
        job = Job("out", sequence.identity, sequence)
        job.tail = Parcel(key, tokens, sequence.blocks[index], index, sequence.namespace)
        sequence.num_publishing += 1
        self._send(job)
        return key

    def take_prefetched(self, identity: Identity) -> list[Transfer]:
        """What was prefetched for a request, which is here now or not to come any more."""
        return self._prefetched.pop(identity, [])

    def forget_link(self, link: str) -> None:
        """Drop what was noted for requests to come over a link."""
        for identity in [i for i in self._prefetched if i[0] == link]:
            del self._prefetched[identity]

    def finish(self, job: Job) -> dict[Sequence, list[bytes]]:
        """Take back a done job: name and release its blocks.

        For each sequence that it concerns: the names of its full blocks that are known to be in the pool by it.
        """
        self._jobs.discard(job)
        in_pool = [parcel for parcel in job.moved if parcel is not job.tail]
        concerned: dict[Sequence, list[bytes]] = {}
        if job.sequence is not None:
            concerned[job.sequence] = []
            job.sequence.transfers += job.transfers
        if job.direction == "in":
            self.arriving.difference_update(parcel.key for parcel in job.parcels())
            for parcel in in_pool:
                self._blocks.seal(parcel.block, parcel.key)
            if job.sequence is None:
                self._note_prefetched(job)
            else:
                concerned[job.sequence] = [parcel.key for parcel in in_pool]
        else:
            self._acknowledge(job, {parcel.key for parcel in in_pool}, concerned)
        self._blocks.release([parcel.block for parcel in job.parcels()])
        return concerned

    def close(self) -> None:
        """Wait for running jobs and end the IO threads."""
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)

    def _parcel(self, sequence: Sequence, index: int) -> Parcel:
        block_tokens = self._blocks.block_tokens
        tokens = sequence.tokens[index * block_tokens : (index + 1) * block_tokens]
        return Parcel(
            sequence.keys[index], tokens, sequence.blocks[index], index, sequence.namespace_at(index)
        )

    def _send(self, job: Job) -> None:
        self._jobs.add(job)
        self._blocks.hold([parcel.block for parcel in job.parcels()])
        if job.direction == "in":
            self.arriving.update(parcel.key for parcel in job.parcels())
        self._threads[job.direction].submit(self._run, job)

    def _acknowledge(self, job: Job, in_pool: set[bytes], concerned: dict[Sequence, list[bytes]]) -> None:
        for parcel in job.certain:
            for sequence in self._leaving.pop(parcel.key):
                sequence.num_publishing -= 1
                names = concerned.setdefault(sequence, [])
                if parcel.key in in_pool:
                    names.append(parcel.key)
        if job.tail is not None and job.sequence is not None:
            job.sequence.num_publishing -= 1

    def _note_prefetched(self, job: Job) -> None:
        self._prefetched.setdefault(job.identity, []).extend(job.transfers)
        while len(self._prefetched) > MAX_PREFETCHED_REQUESTS:
            del self._prefetched[next(iter(self._prefetched))]

    # What follows runs in IO threads and touches only the job, the pool and the memory of the blocks it holds.

    def _run(self, job: Job) -> None:
        try:
            if job.direction == "out":
                self._send_out(job)
            elif job.sequence is None or job.sequence.status is not Status.OVER:
                self._bring_in(job)
        except Exception:
            # Whatever it was, the sequence goes on without these blocks: slow, never wrong, never stuck.
            log.exception("KV transfer of request %s failed", job.identity[1])
            job.moved = []
        self._done(job)

    def _bring_in(self, job: Job) -> None:
        wanted = list(job.certain)
        if job.possible:
            job.num_looked_up = len(job.possible)
            wanted += job.possible[: self._look_up(job.possible)]
        if job.tail is not None:
            wanted.append(job.tail)
        job.looked_up_at = self._clock()
        if not wanted:
            return
        results = self._pool.fetch(
            [FetchItem(p.key, p.tokens, self._memory(p.block), p.namespace) for p in wanted]
        )
        for parcel, result in zip(wanted, results, strict=True):
            if result.ok:
                job.moved.append(parcel)
            else:
                job.num_failed += 1
            if result.num_bytes:
                kind = "fetch_tail" if parcel is job.tail else "fetch"
                job.transfers.append(
                    price(
                        kind, self._pool.place_of(parcel.key), self._place, result.num_bytes, result.seconds
                    )
                )
        if job.tail is not None:
            self._pool.delete([job.tail.key])

    def _look_up(self, parcels: list[Parcel]) -> int:
        """How many leading ones are in the pool. The shared region's come first, the caller's own after them."""
        found = 0
        for namespace, group in itertools.groupby(parcels, key=lambda parcel: parcel.namespace):
            keys = [parcel.key for parcel in group]
            there = self._pool.lookup(keys, namespace)
            found += there
            if there < len(keys):
                break
        return found

    def _send_out(self, job: Job) -> None:
        parcels = list(job.parcels())
        items = [
            PutItem(
                p.key,
                p.tokens,
                self._memory(p.block),
                DEFAULT_TAIL_TTL_S if p is job.tail else None,
                p.namespace,
            )
            for p in parcels
        ]
        for parcel, result in zip(parcels, self._pool.publish(items), strict=True):
            if result.ok:
                job.moved.append(parcel)
            else:
                job.num_failed += 1
            if result.num_bytes:
                kind = "publish_tail" if parcel is job.tail else "publish"
                job.transfers.append(
                    price(
                        kind, self._place, self._pool.place_of(parcel.key), result.num_bytes, result.seconds
                    )
                )
