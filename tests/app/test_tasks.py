"""The end of tasks that run until cancelled."""

import asyncio

from app.tasks import end


async def test_a_task_that_loses_its_cancellation_is_cancelled_again() -> None:
    lost = asyncio.Event()

    async def loop() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                # As a library does that is busy with cleaning up.
                if lost.is_set():
                    raise
                lost.set()

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end([task], patience_s=0.01)
    assert lost.is_set()
    assert task.cancelled()


async def test_what_tasks_end_with_does_not_matter() -> None:
    async def fail() -> None:
        raise ValueError("over")

    async def rest() -> None:
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(fail()), asyncio.create_task(rest())]
    await asyncio.sleep(0)
    await end(tasks)
    assert isinstance(tasks[0].exception(), ValueError)
    assert tasks[1].cancelled()
    await end([])
