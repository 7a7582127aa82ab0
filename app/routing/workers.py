"""Who is alive: the directory says who there is, an open link says who can be reached, both together who can serve.

A worker is routable while its record says `ready` and its link is open. A record that vanishes is believed only
after `MISSING_GRACE_S`, because a Redis that was just restarted is empty until the next heartbeats; a link that
closes is believed at once. When the directory cannot be read, the last view stays in force.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from app.admission.admission import Capacity
from app.routing.link import Connect, Link, open_websocket
from engine.protocol import WorkerRecord
from memory_pool.directory import DirectoryError

log = logging.getLogger(__name__)

MISSING_GRACE_S = 3.0


class DirectoryReader(Protocol):
    """The part of `memory_pool.directory.AsyncDirectory` that the gateway reads."""

    async def members(self) -> Mapping[str, bytes]:
        """Encoded records of all announced workers by id. Raises DirectoryError when it cannot be read."""


@dataclass
class Worker:
    """One worker as the gateway sees it now."""

    record: WorkerRecord
    link: Link
    seen_at: float
    task: asyncio.Task[None] | None = None
    prompt_tokens_sent: int = 0
    """Prompt tokens this gateway has submitted for prefill and not heard the end of."""

    @property
    def is_routable(self) -> bool:
        """Whether new work may be sent to it."""
        return self.link.is_open and self.record.state == "ready"


class Workers:
    """Keeps a link to every worker in the directory."""

    def __init__(
        self,
        directory: DirectoryReader,
        *,
        poll_s: float,
        open_channel: Connect = open_websocket,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._poll_s = poll_s
        self._open_channel = open_channel
        self._workers: dict[str, Worker] = {}
        self._decoder = msgspec.msgpack.Decoder(WorkerRecord)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreadable = False
        self.on_change = on_change

    def all(self) -> Iterable[Worker]:
        """Every known worker, in the order of their ids."""
        return [self._workers[worker_id] for worker_id in sorted(self._workers)]

    def get(self, worker_id: str) -> Worker | None:
        """The worker of that id, if known."""
        return self._workers.get(worker_id)

    def capacity(self, max_sequences_per_worker: int) -> Capacity:
        """What all of them may hold, by role; one side does for both where the other is missing."""
        routable = [worker.record for worker in self._workers.values() if worker.is_routable]
        decode = sum(record.role != "prefill" for record in routable) or len(routable)
        prefill = sum(record.role != "decode" for record in routable) or len(routable)
        return Capacity(max_sequences=decode * max_sequences_per_worker, num_prefill_workers=prefill)

    async def run(self) -> None:
        """Follow the directory until cancelled."""
        try:
            while True:
                await self.refresh()
                await asyncio.sleep(self._poll_s)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def refresh(self) -> None:
        """Read the directory once."""
        try:
            members = await self._directory.members()
        except DirectoryError as error:
            if not self._unreadable:
                log.warning("the directory of workers cannot be read, keeping the last view: %s", error)
            self._unreadable = True
            return
        self._unreadable = False
        now = time.monotonic()
        for worker_id, data in members.items():
            try:
                record = self._decoder.decode(data)
            except msgspec.MsgspecError as error:
                log.error("the record of worker %s cannot be read: %s", worker_id, error)
                continue
            self._see(record, now)
        for worker_id, worker in list(self._workers.items()):
            missing = worker_id not in members
            if missing and (not worker.link.is_open or now - worker.seen_at > MISSING_GRACE_S):
                self._forget(worker_id, worker)

    def _see(self, record: WorkerRecord, now: float) -> None:
        worker = self._workers.get(record.id)
        if worker is not None and (worker.record.pid, worker.record.url) != (record.pid, record.url):
            # The same name in a new process: the old connection leads nowhere.
            self._forget(record.id, worker)
            worker = None
        if worker is None:
            worker = Worker(record, self._new_link(record), now)
            self._workers[record.id] = worker
        changed = (worker.record.state, worker.record.role) != (record.state, record.role)
        worker.record, worker.seen_at = record, now
        if worker.task is None:
            self._connect(worker)
        if changed:
            self.on_change()

    def _new_link(self, record: WorkerRecord) -> Link:
        url = record.url.rstrip("/")
        return Link(record.id, "ws" + url.removeprefix("http") + "/link", self._open_channel)

    def _connect(self, worker: Worker) -> None:
        if worker.link.is_open:
            return
        worker.link = self._new_link(worker.record)
        task = asyncio.create_task(worker.link.run(self.on_change), name=f"link-{worker.record.id}")
        worker.task = task
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if worker.task is done:
                worker.task = None  # the next refresh that still sees the worker connects again
            if not done.cancelled() and done.exception() is not None:
                log.error("link to %s failed", worker.record.id, exc_info=done.exception())
            self.on_change()

        task.add_done_callback(ended)

    def _forget(self, worker_id: str, worker: Worker) -> None:
        del self._workers[worker_id]
        if worker.task is not None:
            worker.task.cancel()
        self.on_change()
