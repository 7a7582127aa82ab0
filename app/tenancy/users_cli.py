"""`cloudmatrix users`: the people or programs of a tenant, to whom keys may belong."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.tenancy import shown
from app.tenancy.door import DATA_DIR, AsJson, DatabaseUrl, DataDir, Door, Pepper, Redis
from app.tenancy.registry import Registry
from app.tenancy.tables import UserRow

users_app = typer.Typer(help="Users of tenants.", no_args_is_help=True)

Email = Annotated[str | None, typer.Option(help="For you; nothing is sent there.")]


@users_app.command("list")
def list_users(
    tenant: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    as_json: AsJson = False,
) -> None:
    """All users."""

    async def collect(registry: Registry) -> list[dict[str, Any]]:
        if tenant is not None:
            await registry.tenant(tenant)
        return [shown.user(row) for row in await registry.users(tenant)]

    found = Door(data_dir, database, pepper).read(lambda _, registry: collect(registry))
    if as_json:
        typer.echo(json.dumps({"users": found}))
        return
    table = Table("user", "tenant", "name", "e-mail", "active")
    for user in found:
        active = "yes" if user["is_active"] else "suspended"
        table.add_row(user["id"], user["tenant_id"], user["name"], user["email"] or "", active)
    Console().print(table)


@users_app.command()
def create(
    name: str,
    tenant: Annotated[str, typer.Option(help="Whose user.")] = "default",
    email: Email = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """A new user. `keys create --tenant --user` makes a key that is this one's."""

    async def make(registry: Registry) -> UserRow:
        return await registry.create_user(tenant, name, email)

    typer.echo(json.dumps(shown.user(Door(data_dir, database, pepper, redis).change(make))))


@users_app.command()
def change(
    user: str,
    name: Annotated[str | None, typer.Option(help="What it is called.")] = None,
    email: Email = None,
    active: Annotated[
        bool | None, typer.Option("--resume/--suspend", help="Whether its keys open anything.")
    ] = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """Rename, suspend or resume a user, on every running gateway at once. What is not given stays."""
    given = {"name": name, "email": email, "is_active": active}
    changes = {field: value for field, value in given.items() if value is not None}

    async def amend(registry: Registry) -> UserRow:
        return await registry.change_user(user, changes)

    typer.echo(json.dumps(shown.user(Door(data_dir, database, pepper, redis).change(amend))))
