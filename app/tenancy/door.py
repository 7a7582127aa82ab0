"""How commands reach the registry of a service, running or not, and tell its gateways that something changed."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from app.errors import GatewayError
from app.tenancy.authenticator import CHANGE_WORD
from app.tenancy.database import Database, DatabaseError, database_url, migrate
from app.tenancy.pepper import load_pepper
from app.tenancy.registry import Registry
from app.tenancy.tenancy import check_pepper
from memory_pool.reservations import AsyncReservations
from memory_pool.store import StoreError

DATA_DIR = Path("~/.local/share/cloudmatrix")
DataDir = Annotated[Path, typer.Option(envvar="CLOUDMATRIX_DATA_DIR", help="The service's data folder.")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", envvar="CLOUDMATRIX_DATABASE_URL", help="None: in the data folder."),
]
Pepper = Annotated[
    str | None, typer.Option(envvar="CLOUDMATRIX_KEY_PEPPER", help="None: in the data folder.")
]
Redis = Annotated[
    str | None,
    typer.Option(
        envvar=["CLOUDMATRIX_REDIS", "CLOUDMATRIX_REDIS_URL"],
        help="The gateways' Redis; none: that of the service in --data-dir.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Door:
    """Where a command's tenants are."""

    data_dir: Path
    database: str | None = None
    pepper: str | None = None
    redis: str | None = None

    def read(self, act: Callable[[Database, Registry], Awaitable[_Found]]) -> _Found:
        """What `act` finds. What goes wrong is one line and exit status 2."""
        return self._run(act, tell=False)

    def change(self, act: Callable[[Registry], Awaitable[_Found]]) -> _Found:
        """What `act` makes of the registry; running gateways know of it when this returns, or a line says why not."""
        return self._run(lambda _, registry: act(registry), tell=True)

    def _run(self, act: Callable[[Database, Registry], Awaitable[_Found]], *, tell: bool) -> _Found:
        folder = self.data_dir.expanduser()

        async def run() -> _Found:
            opened = Database(url)
            try:
                pepper = load_pepper(self.pepper, folder)
                await check_pepper(opened, pepper)
                found = await act(opened, Registry(opened, pepper))
            finally:
                await opened.close()
            if tell:
                await self._tell()
            return found

        try:
            url = database_url(self.database, folder)
            migrate(url)
            return asyncio.run(run())
        except (GatewayError, DatabaseError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error

    async def _tell(self) -> None:
        noted = self.data_dir.expanduser() / "redis" / "url"
        url = self.redis or (noted.read_text() if noted.exists() else None)
        if url is None:
            return  # no service runs here: whoever starts reads the database
        words = AsyncReservations(url)
        try:
            await words.leave_word(CHANGE_WORD, secrets.token_hex(8))
        except StoreError as error:
            typer.echo(f"note: running gateways learn of this within 5 s: {error}", err=True)
        finally:
            await words.close()
