"""Counters that many processes charge at once: never overrun, settled to what was used, nothing kept by the dead."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest

from memory_pool.connection import AsyncConnection, Connection
from memory_pool.redis_server import RedisServer
from memory_pool.reservations import AsyncReservations, Charge, Refused, Reservation, outstanding

_ids = itertools.count()


class Clock:
    """Milliseconds that a test sets."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def counters(own_redis: RedisServer, clock: Clock) -> AsyncIterator[AsyncReservations]:
    reservations = AsyncReservations(own_redis.url, clock=clock)
    yield reservations
    await reservations.close()


def tokens(amount: int, limit: int = 1000) -> list[Charge]:
    return [Charge("cm:q:{t}:tokens", "window", amount, limit)]


async def reserve(counters: AsyncReservations, charges: list[Charge]) -> Reservation | Refused:
    return await counters.reserve(f"r{next(_ids)}", charges)


async def made(counters: AsyncReservations, charges: list[Charge]) -> Reservation:
    reservation = await reserve(counters, charges)
    assert isinstance(reservation, Reservation)
    return reservation


async def test_parallel_reservations_never_overrun_a_window(
    own_redis: RedisServer, clock: Clock, counters: AsyncReservations
) -> None:
    other = AsyncReservations(own_redis.url, clock=clock)
    answers = await asyncio.gather(
        *(reserve(one, tokens(130)) for one in [counters, other] for _ in range(25))
    )
    # 7 x 130 = 910 fit into 1,000, an eighth would make 1,040.
    assert sum(isinstance(answer, Reservation) for answer in answers) == 7
    refused = next(answer for answer in answers if isinstance(answer, Refused))
    assert refused.windows[0].used == 910
    await other.close()


async def test_a_window_is_free_again_when_it_has_passed_and_refusals_do_not_prolong_it(
    counters: AsyncReservations, clock: Clock
) -> None:
    await made(counters, tokens(600))
    clock.now_ms += 30_000
    await made(counters, tokens(400))
    refused = await reserve(counters, tokens(500))
    assert isinstance(refused, Refused)
    # The 600 were charged in a slot that began at 1,000,000.0 s; slots last 1 s; a charge stays until 60 s after the
    # end of its slot, 61 s after its begin: 31 s from now.
    assert refused.retry_after_s == 31.0
    clock.now_ms += 30_999
    assert isinstance(await reserve(counters, tokens(500)), Refused)
    clock.now_ms += 1
    again = await made(counters, tokens(500))
    assert again.windows[0].used == 900
    too_large = await reserve(counters, tokens(1001))
    assert isinstance(too_large, Refused)
    assert too_large.retry_after_s is None


async def test_any_window_of_a_minute_holds_at_most_the_limit(
    counters: AsyncReservations, clock: Clock
) -> None:
    granted = []
    for step in range(600):
        clock.now_ms += 337 + step % 7
        if isinstance(await reserve(counters, tokens(100)), Reservation):
            granted.append(clock.now_ms)
    assert len(granted) > 20
    for begin in granted:
        assert sum(begin <= at < begin + 60_000 for at in granted) * 100 <= 1000


async def test_settling_gives_back_what_was_not_used_and_only_once(counters: AsyncReservations) -> None:
    reservation = await made(counters, tokens(900))
    assert isinstance(await reserve(counters, tokens(200)), Refused)
    await counters.settle([(reservation, [100])])
    await counters.settle([(reservation, [100])])
    after = await made(counters, tokens(200))
    assert after.windows[0].used == 300


async def test_all_charges_are_made_or_none(counters: AsyncReservations) -> None:
    both = [*tokens(100), Charge("cm:q:{t}:concurrent", "leases", 1, 1)]
    await made(counters, both)
    refused = await reserve(counters, both)
    assert isinstance(refused, Refused)
    assert refused.index == 1
    assert (await made(counters, tokens(1))).windows[0].used == 101


async def test_leases_of_the_dead_lapse_and_those_held_do_not(
    counters: AsyncReservations, clock: Clock
) -> None:
    one = [Charge("cm:q:{t}:concurrent", "leases", 1, 2)]
    alive, _dead = await made(counters, one), await made(counters, one)
    assert isinstance(await reserve(counters, one), Refused)
    clock.now_ms += 20_000
    await counters.hold([alive])
    clock.now_ms += 10_001
    third = await made(counters, one)
    assert isinstance(await reserve(counters, one), Refused)
    await counters.settle([(alive, [0]), (third, [0])])
    await made(counters, one)
    await made(counters, one)


async def test_a_budget_counts_what_is_spent_and_what_is_held(
    counters: AsyncReservations, clock: Clock
) -> None:
    def cost(amount: int) -> list[Charge]:
        return [Charge("cm:q:{t}:spent", "budget", amount, 10**15)]

    unseeded = await reserve(counters, cost(1))
    assert isinstance(unseeded, Refused)
    assert unseeded.unseeded
    await counters.seed("cm:q:{t}:spent", 4 * 10**14)
    await counters.seed("cm:q:{t}:spent", 0)
    held = await made(counters, cost(5 * 10**14))
    assert isinstance(await reserve(counters, cost(2 * 10**14)), Refused)
    await counters.settle([(held, [10**14])])
    await made(counters, cost(5 * 10**14 - 1))
    clock.now_ms += 30_001  # that one's process died: what it held is free again
    await made(counters, cost(5 * 10**14))


async def test_nothing_is_left_behind(own_redis: RedisServer) -> None:
    counters = AsyncReservations(own_redis.url)
    charges = [*tokens(10), Charge("cm:q:{t}:concurrent", "leases", 1, 5)]
    reservation = await made(counters, charges)
    await counters.settle([(reservation, [0, 0])])
    connection = AsyncConnection(own_redis.url)
    left = await connection.call("KEYS", "cm:q:*")
    assert [key for key in left if b":settled:" not in key] == []
    assert all([await connection.call("PTTL", key) > 0 for key in left])
    await connection.close()
    await counters.close()


async def test_the_audit_counts_charges_and_nothing_else(
    counters: AsyncReservations, own_redis: RedisServer
) -> None:
    """Words, and the marks of settled reservations, are hashes beside the counters."""
    await counters.leave_word("changed", "1")
    settled = await made(counters, tokens(900))
    await made(counters, [*tokens(40), Charge("cm:q:{t}:concurrent", "leases", 1, 2)])
    await counters.settle([(settled, [100])])
    with contextlib.closing(Connection(own_redis.url)) as connection:
        found = outstanding(connection, "cm:q:")
    # 900 reserved of which 100 were used, and 40 under way.
    assert (found.windows, found.leases, found.budget_holds) == ({"cm:q:{t}:tokens": 140}, 1, 0)
