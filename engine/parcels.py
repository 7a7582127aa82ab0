"""What moves between a worker and the pool: blocks as parcels, and jobs of parcels that move together. Plain values."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from engine.protocol import Reuse
from engine.sequence import Sequence
from fabric.ledger import Transfer

Identity = tuple[str, str]
Direction = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Parcel:
    """One block to move: its name, its tokens and the local block. `index`: which block of the sequence it is."""

    key: bytes
    tokens: list[int]
    block: int
    index: int
    namespace: str


@dataclass(frozen=True, slots=True)
class Lease:
    """Blocks that the pool does not evict as long as `holder` holds them."""

    holder: str
    keys: list[bytes]


@dataclass(slots=True, eq=False)
class Job:
    """Blocks that move together for one sequence, or for a request that is still to come (`sequence` None).

    `certain` are expected in the pool, `possible` are looked up first; `tail` is the partly filled last block.
    `compute_s` is what computing each block would take, by its index. What is looked up or published is leased to
    `holder`, until further notice if `hands_over`, else until the job is done; `leases` end with the job in any case.

    An IO thread fills in what came of it: `moved` are the parcels whose bytes are where they should be.
    """

    direction: Direction
    identity: Identity
    sequence: Sequence | None
    certain: list[Parcel] = field(default_factory=list)
    possible: list[Parcel] = field(default_factory=list)
    tail: Parcel | None = None
    compute_s: dict[int, float] = field(default_factory=dict)
    holder: str | None = None
    hands_over: bool = False
    leases: list[Lease] = field(default_factory=list)
    looked_up_at: float | None = None
    moved: list[Parcel] = field(default_factory=list)
    num_failed: int = 0
    num_written: int = 0
    """Blocks that the pool did not have before."""
    reuse: Reuse | None = None
    transfers: list[Transfer] = field(default_factory=list)

    def parcels(self) -> Iterator[Parcel]:
        """All of them, the tail last."""
        yield from self.certain
        yield from self.possible
        if self.tail is not None:
            yield self.tail
