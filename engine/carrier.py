"""Carries jobs of parcels between the pool and local memory: looks up, decides by cost, fetches, publishes, leases.

For the IO threads of `engine.handoff`. It touches only the job, the pool and the memory of blocks that the job holds.
"""

import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from engine.parcels import Job, Lease, Parcel
from engine.protocol import Reuse
from engine.reuse import FetchTime, choose
from fabric.ledger import price
from memory_pool.client import DEFAULT_TAIL_TTL_S, FetchItem, FetchResult, Lookup, PutItem, PutResult, Reason

_MISS_REASONS = {Reason.ABSENT: "evicted", Reason.UNAVAILABLE: "unavailable"}
"""Of a block that was there when it was looked up or handed over; any other reason is damage."""


class Pool(Protocol):
    """What is needed of `memory_pool.client.PoolClient`."""

    def look(
        self, keys: Items[bytes], namespace: str, /, *, holder: str | None = None, contents: Items[bytes] = ()
    ) -> Lookup:
        """How many leading blocks are in the pool, leased to the holder, and why not more."""

    def fetch(self, items: Items[FetchItem], /) -> list[FetchResult]:
        """Read blocks into local memory."""

    def publish(self, items: Items[PutItem], /) -> list[PutResult]:
        """Store blocks."""

    def delete(self, keys: Items[bytes], /) -> int:
        """Remove blocks."""

    def lease(self, keys: Items[bytes], /, *, holder: str) -> int:
        """Hold blocks against eviction for a while."""

    def release(self, keys: Items[bytes], /, *, holder: str) -> None:
        """End the holder's leases."""

    def place_of(self, key: bytes, /) -> str:
        """The place of the supernode that a block lives in."""


class Carrier:
    """Between the pool and the worker at `place`. `memory(block)` is the local memory of a block. Thread-safe."""

    def __init__(
        self,
        pool: Pool,
        memory: Callable[[int], memoryview],
        *,
        place: str,
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._place = place
        self._clock = clock
        self._fetch_time = FetchTime()

    def bring_in(self, job: Job) -> None:
        """Fetch what is worth fetching of a job's blocks."""
        found, miss_reason = self._look_up(job)
        wanted = [*job.certain, *found]
        job.looked_up_at = self._clock()
        if wanted:
            choice = choose(
                [job.compute_s.get(parcel.index, 0.0) for parcel in wanted],
                self._memory(wanted[0].block).nbytes,
                self._fetch_time.estimate(job.looked_up_at),
            )
            fetch_s, compute_s, num_found = choice.fetch_s, choice.compute_s, len(wanted)
            del wanted[choice.num_blocks :]
        else:
            fetch_s, compute_s, num_found = None, 0.0, 0
        # The tail stands behind the blocks that were handed over: without them it is of no use.
        tail = job.tail if len(wanted) >= len(job.certain) else None
        for parcel, result in self._fetch([*wanted, tail] if tail is not None else wanted):
            if result.ok:
                job.moved.append(parcel)
            else:
                job.num_failed += 1
                if parcel is not tail and result.reason is not None:
                    miss_reason = _MISS_REASONS.get(result.reason, "damaged")
            if result.num_bytes:
                kind = "fetch_tail" if parcel is tail else "fetch"
                source = self._pool.place_of(parcel.key)
                job.transfers.append(price(kind, source, self._place, result.num_bytes, result.seconds))
        if job.tail is not None:
            self._pool.delete([job.tail.key])
        job.reuse = Reuse(
            found_blocks=num_found,
            chosen_blocks=len(wanted),
            fetched_blocks=sum(parcel is not tail for parcel in job.moved),
            fetch_s=fetch_s,
            compute_s=compute_s,
            miss_reason=miss_reason,
        )

    def send_out(self, job: Job) -> None:
        """Publish a job's blocks, and hold them for whoever they are handed to."""
        parcels = list(job.parcels())
        contents = _contents(job)
        items = [
            PutItem(
                p.key,
                p.tokens,
                self._memory(p.block),
                DEFAULT_TAIL_TTL_S if p is job.tail else None,
                p.namespace,
                None if p is job.tail else contents[p.index],
            )
            for p in parcels
        ]
        for parcel, result in zip(parcels, self._pool.publish(items), strict=True):
            if result.ok:
                job.moved.append(parcel)
            else:
                job.num_failed += 1
            if result.num_bytes:
                job.num_written += _is_in_prompt(parcel, job)
                kind = "publish_tail" if parcel is job.tail else "publish"
                target = self._pool.place_of(parcel.key)
                job.transfers.append(price(kind, self._place, target, result.num_bytes, result.seconds))
        stored = [parcel.key for parcel in job.moved]
        if job.hands_over and job.holder is not None and stored:
            self._pool.lease(stored, holder=job.holder)

    def let_go(self, leases: Iterable[Lease]) -> None:
        """End leases whose purpose is served."""
        for lease in leases:
            self._pool.release(lease.keys, holder=lease.holder)

    def _fetch(self, wanted: list[Parcel]) -> list[tuple[Parcel, FetchResult]]:
        if not wanted:
            return []
        began = self._clock()
        results = self._pool.fetch(
            [FetchItem(p.key, p.tokens, self._memory(p.block), p.namespace) for p in wanted]
        )
        ended = self._clock()
        self._fetch_time.fetched(sum(result.num_bytes for result in results), ended - began, ended)
        return list(zip(wanted, results, strict=True))

    def _look_up(self, job: Job) -> tuple[list[Parcel], str | None]:
        """The leading possible parcels that are in the pool, and why the next is not.

        The shared region's come first, the caller's own after them.
        """
        found: list[Parcel] = []
        contents = _contents(job)
        for namespace, group in itertools.groupby(job.possible, key=lambda parcel: parcel.namespace):
            parcels = list(group)
            began = self._clock()
            there = self._pool.look(
                [parcel.key for parcel in parcels],
                namespace,
                holder=job.holder,
                contents=[contents[parcel.index] for parcel in parcels],
            )
            self._fetch_time.looked_up(self._clock() - began)
            found += parcels[: there.num_blocks]
            if there.num_blocks < len(parcels):
                break
        else:
            there = Lookup(0, None)
        if found and job.holder is not None and not job.hands_over:
            job.leases.append(Lease(job.holder, [parcel.key for parcel in found]))
        return found, there.miss_reason


def _contents(job: Job) -> list[bytes]:
    """The contents of a job's full blocks, by index in their sequence."""
    sequence = job.sequence
    last = max((parcel.index for parcel in (*job.certain, *job.possible)), default=-1)
    return [] if sequence is None else sequence.scheme.contents(sequence.tokens, last + 1)


def _is_in_prompt(parcel: Parcel, job: Job) -> bool:
    """Whether a full block holds nothing but tokens of its request's prompt."""
    sequence = job.sequence
    if sequence is None or parcel is job.tail:
        return False
    return (parcel.index + 1) * len(parcel.tokens) <= sequence.num_prompt
