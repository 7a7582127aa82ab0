"""Tenancy as the gateway sees it: who calls, may this request begin, and what did it use."""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from app import tasks
from app.requests.record import RequestRecord
from app.settings import Settings
from app.tenancy.authenticator import Authenticator
from app.tenancy.database import Database, DatabaseError, any_key, database_url, migrate
from app.tenancy.ledger import Entry, Ledger, day_of
from app.tenancy.pepper import fingerprint_of, load_pepper
from app.tenancy.principal import current_call
from app.tenancy.quota import Leave, Quota
from app.tenancy.registry import Registry
from app.tenancy.spool import Spool
from app.tenancy.tables import FactRow
from memory_pool.reservations import AsyncReservations

log = logging.getLogger(__name__)

ORPHANS_S = 5.0
"""Pause between two looks for what other processes left behind."""


@dataclass(eq=False)
class Account:
    """One admitted request's leave and row in the ledger. `enter` or `cancel` must be called."""

    tenancy: "Tenancy"
    record: RequestRecord
    leave: Leave
    _is_entered: bool = False

    def note(self, completion_tokens: int) -> None:
        """The answer is complete: its row must exist whatever happens from here."""
        self.tenancy.ledger.write_ahead(self._entry("completed", completion_tokens))

    def enter(self, status: str, completion_tokens: int) -> None:
        """The last word, when all workers have reported; later calls do nothing."""
        if self._is_entered:
            return
        self._is_entered = True
        entry = self._entry(status, completion_tokens)
        self.tenancy.ledger.enter(entry)
        self.tenancy.quota.settle(
            self.leave, num_tokens=entry.prompt_tokens + entry.completion_tokens, cost_nano=entry.cost_nano
        )
        self.tenancy.forget(self)

    def cancel(self) -> None:
        """The request was turned away after all: nothing is charged, nothing entered."""
        self._is_entered = True
        self.tenancy.quota.cancel(self.leave)
        self.tenancy.forget(self)

    def _entry(self, status: str, completion_tokens: int) -> Entry:
        record, principal, now = self.record, self.leave.principal, time.time()
        return Entry(
            request_id=record.request_id,
            ended_at=int(now),
            day=day_of(now),
            tenant_id=principal.tenant_id,
            user_id=principal.user_id,
            key_id=principal.key_id,
            model=record.model,
            endpoint=record.endpoint,
            status=status,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=completion_tokens,
            cost_nano=self.leave.price.cost_nano(
                record.prompt_tokens, record.cached_tokens, completion_tokens
            ),
        )


class Tenancy:
    """One gateway's tenancy. `start` before the first request, `close` after the last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.limited_max_tokens = settings.limited_max_tokens
        self._accounts: dict[Account, None] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the database and the spool. Raises DatabaseError."""
        settings = self._settings
        url = _url_of(settings)
        await asyncio.to_thread(migrate, url)
        given = settings.key_pepper.get_secret_value() if settings.key_pepper else None
        pepper = load_pepper(given, settings.data_dir)
        self.database = Database(url)
        await check_pepper(self.database, pepper)
        self.registry = Registry(self.database, pepper)
        self._reservations = AsyncReservations(
            settings.redis_url, window_s=settings.limit_window_s, lease_s=settings.lease_s
        )
        self.ledger = Ledger(self.database, Spool(settings.data_dir / "usage"))
        self.quota = Quota(self._reservations, self.ledger)
        self.authenticator = Authenticator(
            self.registry,
            self._reservations,
            pepper=pepper,
            operator_keys=[key.get_secret_value().encode() for key in settings.api_keys],
            key_required=settings.key_required,
        )
        await self.authenticator.reload()
        runs = (self.authenticator.run(), self.quota.run(), self.ledger.run(), self._adopt())
        self._tasks = [asyncio.create_task(run) for run in runs]

    async def admit(
        self, record: RequestRecord, model: str, *, prompt_tokens: int, output_tokens: int
    ) -> Account:
        """Leave for the request of the current call. Raises PermissionDeniedError and what `Quota.reserve` raises."""
        call = current_call()
        call.principal.check_model(model)
        leave = await self.quota.reserve(
            call,
            record.request_id,
            model,
            self.authenticator.price(model),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
        account = Account(self, record, leave)
        self._accounts[account] = None
        return account

    def forget(self, account: Account) -> None:
        """The account is closed."""
        self._accounts.pop(account, None)

    async def close(self) -> None:
        """Enter what is still open, settle, and bring the ledger to the database or leave it in the spool."""
        await tasks.end(self._tasks)
        for account in list(self._accounts):
            account.enter("cancelled", account.record.completion_tokens)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self.quota.flush()
        await self.ledger.close()
        await self._reservations.close()
        await self.database.close()

    async def _adopt(self) -> None:
        while True:
            try:
                number = await self.ledger.adopt()
            except (SQLAlchemyError, OSError) as error:
                log.warning("usage that another process left is not entered yet: %s", error)
            else:
                if number:
                    log.warning("entered %d requests that another process left in the spool", number)
            await asyncio.sleep(ORPHANS_S)


def has_keys(settings: Settings) -> bool:
    """Whether the database of these settings has an API key in force. Raises DatabaseError."""
    url = _url_of(settings)
    migrate(url)
    return any_key(url)


def _url_of(settings: Settings) -> URL:
    configured = settings.database_url.get_secret_value() if settings.database_url else None
    return database_url(configured, settings.data_dir)


async def check_pepper(database: Database, pepper: bytes) -> None:
    """Raises DatabaseError when the keys of this database were hashed under another pepper."""
    fingerprint = fingerprint_of(pepper)
    try:
        async with database.session() as session:
            if await session.get(FactRow, "pepper") is None:
                session.add(FactRow(name="pepper", value=fingerprint))
    except IntegrityError:
        pass  # another process was first
    async with database.session() as session:
        fact = await session.get(FactRow, "pepper")
    if fact is None or fact.value != fingerprint:
        raise DatabaseError(
            "the keys of this database were made with another pepper: set CLOUDMATRIX_KEY_PEPPER to the same value "
            "for every gateway and command, or share the data folder's file key_pepper"
        )
