"""The task that settles reservations."""

import asyncio
from typing import Any, cast

from app.tenancy.quota import Leave, Quota
from memory_pool.reservations import Reservation


class Settling:
    """Takes every settlement."""

    lease_s = 30.0

    def __init__(self) -> None:
        self.settled: list[tuple[Reservation, list[int]]] = []

    async def settle(self, batch: list[tuple[Reservation, list[int]]]) -> None:
        self.settled += batch


async def _end_together_with_a_request() -> bool:
    quota = Quota(cast("Any", Settling()), cast("Any", None))
    reservation = Reservation("r", (), 0, ())
    quota._held["r"] = reservation
    run = asyncio.create_task(quota.run())
    await asyncio.sleep(0.01)  # it waits for something to settle
    quota.settle(Leave(cast("Any", None), cast("Any", None), [], reservation), num_tokens=1, cost_nano=0)
    # Both in one turn of the loop after the wait is over, before the task goes on.
    asyncio.get_running_loop().call_soon(run.cancel)
    done, _ = await asyncio.wait({run}, timeout=5)
    run.cancel()
    return run in done


def test_a_request_that_ends_together_with_the_service_does_not_keep_it() -> None:
    assert asyncio.run(_end_together_with_a_request())
