"""The ticket of a phase: chunks are taken from both ends, each once, and serial numbers may start again."""

from typing import Any

from engine.kernels.jit import jit
from engine.kernels.team import CHUNK_BITS, chunk_of, next_ticket, phases_since, serial_of, taken


@jit
def _take(ticket: int, count: int, worker: int) -> Any:
    return chunk_of(ticket, count, worker), next_ticket(ticket, worker), taken(ticket)


@jit
def _since(ticket: int, first: int) -> Any:
    return phases_since(serial_of(ticket), first)


def test_two_workers_meet_and_no_chunk_is_taken_twice() -> None:
    ticket, found = 7 << CHUNK_BITS, []
    for worker in (0, 1, 1, 0, 1, 2, 3):
        chunk, ticket, before = _take(ticket, 7, worker)
        assert before == len(found)
        found.append(chunk)
    # Even workers 0, 1, 2 from the front; odd ones 6, 5, 4, 3 from the back.
    assert found == [0, 6, 5, 1, 4, 2, 3]
    assert _take(ticket, 7, 0)[2] == 7


def test_serial_numbers_start_again() -> None:
    assert _since(9 << CHUNK_BITS, 4) == 5
    assert _since(3 << CHUNK_BITS, 4) == -1
    # The last of 32 bits reads as -1; the next is 0, and both come after the one before them.
    last = -1 << CHUNK_BITS
    assert _since(last, -3) == 2
    assert _since(0, -1) == 1
    highest = (1 << CHUNK_BITS - 1) - 1
    assert _since((highest + 1 - (1 << CHUNK_BITS)) << CHUNK_BITS, highest) == 1
