"""A worker's entry in the directory: announced every second, gone four seconds after the last time.

A directory that cannot be reached changes nothing for the worker: it serves whom it serves and announces itself again
as soon as it can.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from engine.protocol import WorkerRecord
from memory_pool.directory import AsyncDirectory, DirectoryError

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
TTL_S = 4.0


class Membership:
    """Announces `record()` from `run` until `stop`."""

    def __init__(self, directory: AsyncDirectory, record: Callable[[], WorkerRecord]) -> None:
        self._directory = directory
        self._record = record
        self._changed = asyncio.Event()
        self._is_stopping = False
        self.is_announced = False

    def announce_now(self) -> None:
        """Something changed that others should know before the next heartbeat."""
        self._changed.set()

    async def run(self) -> None:
        """Announce until `stop`. Ended by a flag: a client library may swallow a cancellation in mid-call."""
        while not self._is_stopping:
            await self._announce()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._changed.wait()
            self._changed.clear()

    def stop(self) -> None:
        """Let `run` return."""
        self._is_stopping = True
        self._changed.set()

    async def leave(self) -> None:
        """Be gone at once instead of after the time to live. To be called when `run` has returned."""
        try:
            await self._directory.withdraw(self._record().id)
        except DirectoryError as error:
            log.warning("cannot leave the directory, the entry runs out by itself: %s", error)
        await self._directory.close()

    async def _announce(self) -> None:
        record = self._record()
        try:
            await self._directory.announce(record.id, msgspec.msgpack.encode(record), TTL_S)
        except DirectoryError as error:
            if self.is_announced:
                log.warning("cannot announce myself, serving goes on: %s", error)
            self.is_announced = False
        else:
            if not self.is_announced:
                log.info("announced as %s", record.id)
            self.is_announced = True
