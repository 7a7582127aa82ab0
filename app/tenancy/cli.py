"""`cloudmatrix keys`: tenants' API keys, straight in the database: the way to the first one."""

import contextlib
import json
import time
from typing import Annotated, Any

import typer

from app.errors import ConflictError
from app.tenancy import shown
from app.tenancy.door import DATA_DIR, DatabaseUrl, DataDir, Door, Pepper, Redis
from app.tenancy.registry import Registry
from app.tenancy.tables import KeyRow

keys_app = typer.Typer(help="API keys of tenants.", no_args_is_help=True)

_DAY_S = 86400
Models = Annotated[str | None, typer.Option(help="Only these, comma-separated; '' opens all.")]
Networks = Annotated[
    str | None, typer.Option(help="Only from these addresses or ranges (10.1.0.0/16); '' opens all.")
]
Endpoints = Annotated[str | None, typer.Option(help="Only these paths (/v1/chat/*); '' opens all.")]
Days = Annotated[float | None, typer.Option(min=0, help="Ends this many days from now; 0: never.")]


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key; made if there is none of that name.")] = "default",
    name: Annotated[str, typer.Option(help="What it is for.")] = "command line",
    user: Annotated[str | None, typer.Option(help="Id of the tenant's user whose it is.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It opens the admin API, too.")] = False,
    models: Models = None,
    networks: Networks = None,
    endpoints: Endpoints = None,
    days: Days = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """Make a key and print it, this once. Running gateways take it at once."""
    scopes = _scopes(models, networks, endpoints, days)

    async def make(registry: Registry) -> str:
        with contextlib.suppress(ConflictError):  # it exists, which is as good
            await registry.create_tenant(tenant, tenant, weight=1.0, tier=0)
        return (await registry.issue_key(tenant, name, user_id=user, is_admin=admin, **scopes)).key

    typer.echo(Door(data_dir, database, pepper, redis).change(make))


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
) -> None:
    """All keys, by what may be shown of them, as JSON."""
    rows = Door(data_dir, database, pepper).read(lambda _, registry: registry.keys(tenant))
    typer.echo(json.dumps({"keys": [shown.key(row) for row in rows]}))


@keys_app.command()
def change(
    key_id: str,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    models: Models = None,
    networks: Networks = None,
    endpoints: Endpoints = None,
    days: Days = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """Rename a key, narrow or widen what it opens, move its end. What is not given stays."""
    changes = _scopes(models, networks, endpoints, days) | ({"name": name} if name else {})

    async def amend(registry: Registry) -> KeyRow:
        return await registry.change_key(key_id, changes)

    typer.echo(json.dumps(shown.key(Door(data_dir, database, pepper, redis).change(amend))))


@keys_app.command()
def revoke(
    key_id: str,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """End a key, on every running gateway at once."""

    async def end(registry: Registry) -> str:
        return f"{(await registry.revoke_key(key_id)).id} revoked"

    typer.echo(Door(data_dir, database, pepper, redis).change(end))


def _scopes(
    models: str | None, networks: str | None, endpoints: str | None, days: float | None
) -> dict[str, Any]:
    """What was given, as the registry takes it."""
    found: dict[str, Any] = {}
    for scope, text in (("models", models), ("networks", networks), ("endpoints", endpoints)):
        if text is not None:
            found[scope] = [part.strip() for part in text.split(",") if part.strip()] or None
    if days is not None:
        found["expires_at"] = int(time.time() + days * _DAY_S) if days else None
    return found
