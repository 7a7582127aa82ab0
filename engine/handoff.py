"""A sequence's KV out to the pool and in from it, beside the engine's steps.

The engine thread asks (`load`, `prefetch`, `publish`, `publish_tail`) and later takes the finished `Job` back
(`finish`); in between an IO thread moves bytes between the pool and the memory of local blocks. A job holds the blocks
it reads or writes, so that whatever becomes of its sequence, nobody else gets them before the last byte has moved.

    asked -> in an IO thread -> done, in the engine's inbox -> finish() -> blocks named and released
"""

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor

from engine.block_manager import BlockManager
from engine.carrier import Carrier, Pool
from engine.parcels import Identity, Job, Lease, Parcel
from engine.protocol import Prefetch
from engine.sequence import Sequence, Status
from fabric.ledger import Transfer
from memory_pool.keys import namespace_at, tail_key

log = logging.getLogger(__name__)

MAX_PREFETCHED_REQUESTS = 4096
"""Requests whose blocks were prefetched and that have not come yet; beyond it the oldest is forgotten."""


class Handoff:
    """KV traffic of one worker at `place`. Methods are for the engine thread; `done` takes finished jobs from any.

    `memory(block)` is the local memory of a block; `clock` gives the instants of the timelines;
    `compute_s(first, num_tokens)` predicts the seconds of computing tokens from position `first` on.
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
        compute_s: Callable[[int, int], float],
        num_threads: int = 2,
    ) -> None:
        self._carrier = Carrier(pool, memory, place=place, clock=clock)
        self._blocks = blocks
        self._done = done
        self._compute_s = compute_s
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
        """Bring in KV of an admitted sequence's blocks behind `num_computed`; False when there is nothing to bring."""
        if sequence.computes_all:
            return False
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
        job.holder = sequence.lease if sequence.hands_over else f"read {sequence.request_id}"
        job.hands_over = sequence.hands_over
        if handoff is not None and handoff.lease:
            tail_keys = [handoff.tail_key] if handoff.tail_key else []
            job.leases.append(Lease(handoff.lease, [*handoff.block_keys, *tail_keys]))
        if not job.certain and not job.possible and tail is None:
            if job.leases:
                self._threads["out"].submit(self._let_go, job.leases)
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
        job.holder, job.hands_over = sequence.lease, sequence.hands_over
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
        job.holder, job.hands_over = sequence.lease, sequence.hands_over
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
            job.sequence.written_tokens += job.num_written * self._blocks.block_tokens
            job.sequence.reuse = job.reuse or job.sequence.reuse
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
            size = self._blocks.block_tokens
            job.compute_s = {p.index: self._compute_s(p.index * size, size) for p in job.parcels()}
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

    # What follows runs in IO threads.

    def _run(self, job: Job) -> None:
        try:
            if job.direction == "out":
                self._carrier.send_out(job)
            elif job.sequence is None or job.sequence.status is not Status.OVER:
                self._carrier.bring_in(job)
        except Exception:
            # Whatever it was, the sequence goes on without these blocks: slow, never wrong, never stuck.
            log.exception("KV transfer of request %s failed", job.identity[1])
            job.moved = []
        leases = job.leases
        self._done(job)
        self._let_go(leases)

    def _let_go(self, leases: Iterable[Lease]) -> None:
        try:
            self._carrier.let_go(leases)
        except Exception:
            # They run out by themselves.
            log.exception("leases were not released")
