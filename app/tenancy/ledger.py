"""The ledger of usage: one row in the database for every request that was admitted, however it ended.

    write_ahead (the answer is complete, or its client left) -> enter (the workers have reported) -> database

Both leave a line in the spool before they return, so what an answer's usage said is in the ledger even if the process
dies the next moment: the next gateway over the same folder enters what it finds there. The database is written in
batches beside the requests and may be away for as long as it likes. A request has one row whatever is entered twice.
"""

import asyncio
import functools
import logging
import time

import msgspec
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from app.tenancy.database import Database
from app.tenancy.limits import Limit
from app.tenancy.spool import Spool
from app.tenancy.tables import KeyRow, UsageRow

log = logging.getLogger(__name__)

DAY_S = 86_400
FLUSH_S = 0.2
RETRY_S = 2.0
"""Pause after the database refused a batch."""
MAX_BATCH = 2000
SPOOL_BYTES = 1 << 20
"""A spool file of this size is left for a new one."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the ledger."""

    request_id: str
    ended_at: int
    day: str
    tenant_id: str
    user_id: str | None
    key_id: str | None
    model: str
    endpoint: str
    status: str
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    cost_nano: int


def day_of(instant: float) -> str:
    """`YYYY-MM-DD`, UTC."""
    return _day(int(instant // DAY_S))


@functools.lru_cache(maxsize=4)  # asked three times a request, and hardly ever for another day
def _day(number: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(number * DAY_S))


class Ledger:
    """Written by one gateway. `start` before the first entry, `close` at the end."""

    def __init__(self, database: Database, spool: Spool) -> None:
        self._database = database
        self._spool = spool
        self._encode = msgspec.json.Encoder().encode
        self._ahead: dict[str, Entry] = {}
        self._pending: list[Entry] = []

    @property
    def num_pending(self) -> int:
        """Entries that are not in the database yet."""
        return len(self._pending) + len(self._ahead)

    def write_ahead(self, entry: Entry) -> None:
        """Keep what is known of a request whose workers have yet to report; `enter` follows."""
        self._spool.append(self._encode(entry))
        self._ahead[entry.request_id] = entry

    def enter(self, entry: Entry) -> None:
        """Keep the final word on a request."""
        if self._ahead.pop(entry.request_id, None) != entry:
            self._spool.append(self._encode(entry))
        self._pending.append(entry)

    async def adopt(self) -> int:
        """Enter what processes that died have left behind; how many requests that were."""
        with self._spool.orphans() as (paths, lines):
            found: dict[str, Entry] = {}
            for line in lines:
                try:
                    entry = msgspec.json.decode(line, type=Entry)
                except msgspec.DecodeError:
                    log.exception("a line of the usage spool cannot be read: %r", line[:200])
                    continue
                found[entry.request_id] = entry
            if found:
                await self._insert(list(found.values()))
            for path in paths:
                path.unlink(missing_ok=True)
        return len(found)

    async def run(self) -> None:
        """Bring entries to the database until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except (SQLAlchemyError, OSError) as error:
                log.warning("the ledger waits with %d entries: %s", len(self._pending), error)
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> None:
        """Bring everything that is pending to the database. Raises SQLAlchemyError; nothing is lost then."""
        if self._spool.num_bytes >= SPOOL_BYTES or (self._pending and not self._ahead):
            self._spool.start_anew([self._encode(entry) for entry in self._ahead.values()])
            unfinished = len(self._pending)
        else:
            unfinished = 0
        while self._pending:
            batch = self._pending[:MAX_BATCH]
            await self._insert(batch)
            del self._pending[: len(batch)]
            unfinished -= len(batch)
        if unfinished <= 0:
            self._spool.forget_old()

    async def close(self, within_s: float = 3.0) -> None:
        """Enter what is known of every request and bring all to the database, or leave it for the next process."""
        for entry in list(self._ahead.values()):
            self.enter(entry)
        forget = True
        try:
            async with asyncio.timeout(within_s):
                await self.flush()
        except (TimeoutError, SQLAlchemyError, OSError) as error:
            forget = False
            log.warning("%d ledger entries stay in the spool: %r", len(self._pending), error)
        self._spool.close(forget=forget)

    async def spent_nano(self, limit: Limit, month: str) -> int:
        """What the ledger says a limit's subject spent in a month (`YYYY-MM`)."""
        subject: dict[str, ColumnElement[bool]] = {
            "tenant": UsageRow.tenant_id == limit.subject_id,
            "user": UsageRow.user_id == limit.subject_id,
            "key": UsageRow.key_id == limit.subject_id,
        }
        query = (
            select(func.coalesce(func.sum(UsageRow.cost_nano), 0))
            .where(subject[limit.subject_kind])
            .where(UsageRow.day >= f"{month}-01", UsageRow.day <= f"{month}-31")
        )
        if limit.model:
            query = query.where(UsageRow.model == limit.model)
        async with self._database.session() as session:
            return int(await session.scalar(query) or 0)

    async def _insert(self, entries: list[Entry]) -> None:
        rows = [msgspec.structs.asdict(entry) for entry in entries]
        dialect = sqlite if self._database.url.drivername == "sqlite" else postgresql
        last_used: dict[str, int] = {}
        for entry in entries:
            if entry.key_id is not None:
                last_used[entry.key_id] = max(last_used.get(entry.key_id, 0), entry.ended_at)
        async with self._database.session() as session:
            await session.execute(
                dialect.insert(UsageRow).on_conflict_do_nothing(index_elements=["request_id"]), rows
            )
            for key_id, at in sorted(last_used.items()):  # in one order, so that two gateways cannot deadlock
                await session.execute(update(KeyRow).where(KeyRow.id == key_id).values(last_used_at=at))
