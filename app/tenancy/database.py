"""The database: SQLite in the data folder, or PostgreSQL by URL; brought up to the newest schema before use."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
NEWEST = "0001"
"""The revision that this code works with."""
_one_at_a_time = threading.Lock()
"""Alembic keeps its context in the process."""
BUSY_S = 10.0
"""How long a writer of SQLite waits for another one."""


class DatabaseError(Exception):
    """The database cannot be used; the message says why and never holds a password."""


def database_url(configured: str | None, data_dir: Path) -> URL:
    """The URL without a driver's name, from the setting, or the file in the data folder. Raises DatabaseError."""
    if configured is None:
        return make_url("sqlite://").set(database=str(data_dir / "cloudmatrix.db"))
    try:
        url = make_url(configured)
    except ArgumentError:
        raise DatabaseError(
            "CLOUDMATRIX_DATABASE_URL: expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    backend = "postgresql" if url.drivername.partition("+")[0] in ("postgres", "postgresql") else "sqlite"
    if backend == "sqlite" and not url.drivername.startswith("sqlite"):
        raise DatabaseError(
            f"CLOUDMATRIX_DATABASE_URL: {url.drivername} is not supported, only sqlite and postgresql"
        )
    return url.set(drivername=backend)


class Database:
    """Sessions over one database. `migrate` first."""

    def __init__(self, url: URL) -> None:
        self.url = url
        is_sqlite = url.drivername == "sqlite"
        driver = "sqlite+aiosqlite" if is_sqlite else "postgresql+psycopg"
        options: dict[str, Any] = {} if is_sqlite else {"pool_size": 8, "pool_pre_ping": True}
        try:
            self.engine: AsyncEngine = create_async_engine(url.set(drivername=driver), **options)
        except ImportError as error:
            raise DatabaseError(f"{error}: install cloudmatrix[postgres] to use PostgreSQL") from error
        if is_sqlite:
            event.listen(self.engine.sync_engine, "connect", set_up_sqlite)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed at the end, rolled back on an error."""
        async with self._sessions() as session, session.begin():
            yield session

    async def close(self) -> None:
        """Idempotent."""
        await self.engine.dispose()


def migrate(url: URL) -> None:
    """Bring the database to the newest schema; several processes may do so at once. Raises DatabaseError."""
    if url.drivername == "sqlite" and url.database:
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DatabaseError(f"database {url.database}: {error.strerror}") from error
    try:
        with contextlib.closing(_sync_engine(url)) as engine, engine.connect() as connection:
            if revision(connection) != NEWEST:
                with _one_at_a_time:
                    _upgrade(connection)
    except SQLAlchemyError as error:
        raise DatabaseError(f"database {url.render_as_string()}: {_cause(error)}") from error


def revision(connection: Connection) -> str | None:
    """The schema's revision; None for an empty database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def any_key(url: URL) -> bool:
    """Whether any API key is in force. Raises DatabaseError."""
    try:
        with contextlib.closing(_sync_engine(url)) as engine, engine.connect() as connection:
            query = text("SELECT 1 FROM api_keys WHERE revoked_at IS NULL LIMIT 1")
            return connection.execute(query).scalar() is not None
    except SQLAlchemyError as error:
        raise DatabaseError(f"database {url.render_as_string()}: {_cause(error)}") from error


def _upgrade(connection: Connection) -> None:
    # Imported here: a start that finds the newest schema does without.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    connection.commit()


class _sync_engine:  # noqa: N801 - used as a function
    """A short-lived engine without asyncio, disposed of by `close`."""

    def __init__(self, url: URL) -> None:
        driver = "sqlite+pysqlite" if url.drivername == "sqlite" else "postgresql+psycopg"
        try:
            self._engine = create_engine(url.set(drivername=driver))
        except ImportError as error:
            raise DatabaseError(f"{error}: install cloudmatrix[postgres] to use PostgreSQL") from error
        if url.drivername == "sqlite":
            event.listen(self._engine, "connect", set_up_sqlite)

    def connect(self) -> Connection:
        return self._engine.connect()

    def close(self) -> None:
        self._engine.dispose()


def set_up_sqlite(connection: Any, _record: object) -> None:
    """What every new connection to SQLite begins with."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {round(BUSY_S * 1000)}")
    _use_write_ahead_log(cursor)
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_write_ahead_log(cursor: Any) -> None:
    # SQLite does not wait here as `busy_timeout` says: who meets another one that is about to change the file is told
    # so at once. The mode lasts, so only the first connections to a new file come here with something to do.
    give_up = time.monotonic() + BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _cause(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
