"""How tasks that run until cancelled are ended."""

import asyncio
from collections.abc import Iterable

PATIENCE_S = 1.0
"""A task that goes on for so long after it was cancelled is cancelled again."""


async def end(tasks: Iterable[asyncio.Task[None]], *, patience_s: float = PATIENCE_S) -> None:
    """Cancel tasks and wait for their end, whatever they end with.

    Again where a library lost the cancellation: one that comes while SQLAlchemy gives a connection back is swallowed
    there, and a loop around it goes on.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=patience_s)
