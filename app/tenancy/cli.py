"""`cloudmatrix keys`: tenants' API keys, straight in the database: the way to the first one."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from app.errors import ConflictError, GatewayError
from app.tenancy.database import Database, database_url, migrate
from app.tenancy.pepper import load_pepper
from app.tenancy.registry import Registry

keys_app = typer.Typer(help="API keys of tenants.", no_args_is_help=True)

DataDir = Annotated[Path, typer.Option(envvar="CLOUDMATRIX_DATA_DIR", help="The service's data folder.")]
DatabaseUrl = Annotated[str | None, typer.Option(envvar="CLOUDMATRIX_DATABASE_URL", show_envvar=True)]
Pepper = Annotated[str | None, typer.Option(envvar="CLOUDMATRIX_KEY_PEPPER", show_envvar=True)]
_DATA_DIR = Path("~/.local/share/cloudmatrix")


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key; made if there is none of that name.")] = "default",
    name: Annotated[str, typer.Option(help="What it is for.")] = "command line",
    admin: Annotated[bool, typer.Option("--admin", help="It opens the admin API, too.")] = False,
    data_dir: DataDir = _DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
) -> None:
    """Make a key and print it, this once. A running gateway takes it within 5 s."""

    async def make(registry: Registry) -> str:
        with contextlib.suppress(ConflictError):  # it exists, which is as good
            await registry.create_tenant(tenant, tenant, weight=1.0, tier=0)
        return (await registry.issue_key(tenant, name, is_admin=admin)).key

    typer.echo(_with_registry(make, data_dir, database, pepper))


@keys_app.command("list")
def list_keys(data_dir: DataDir = _DATA_DIR, database: DatabaseUrl = None, pepper: Pepper = None) -> None:
    """All keys, by what may be shown of them, as JSON."""

    async def collect(registry: Registry) -> str:
        rows = await registry.keys(None)
        shown = ("id", "tenant_id", "name", "is_admin", "expires_at", "revoked_at", "last_used_at")
        return json.dumps(
            {
                "keys": [
                    {
                        **{field: getattr(row, field) for field in shown},
                        "shown": f"{row.prefix}…{row.last_four}",
                    }
                    for row in rows
                ]
            }
        )

    typer.echo(_with_registry(collect, data_dir, database, pepper))


@keys_app.command()
def revoke(
    key_id: str, data_dir: DataDir = _DATA_DIR, database: DatabaseUrl = None, pepper: Pepper = None
) -> None:
    """End a key. Gateways notice within 5 s; `POST /api/admin/keys/{id}/revoke` is at once."""

    async def end(registry: Registry) -> str:
        return f"{(await registry.revoke_key(key_id)).id} revoked"

    typer.echo(_with_registry(end, data_dir, database, pepper))


def _with_registry(
    act: Callable[[Registry], Awaitable[str]], data_dir: Path, database: str | None, pepper: str | None
) -> str:
    folder = data_dir.expanduser()

    async def run() -> str:
        opened = Database(url)
        try:
            return await act(Registry(opened, load_pepper(pepper, folder)))
        finally:
            await opened.close()

    url = database_url(database, folder)
    migrate(url)
    try:
        return asyncio.run(run())
    except GatewayError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
