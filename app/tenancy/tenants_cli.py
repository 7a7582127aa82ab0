"""`cloudmatrix tenants`: tenants, their shares and their limits."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.tenancy import shown
from app.tenancy.door import DATA_DIR, AsJson, DatabaseUrl, DataDir, Door, Pepper, Redis
from app.tenancy.limits import Limit
from app.tenancy.prices_cli import nano
from app.tenancy.registry import Registry
from app.tenancy.tables import TenantRow

tenants_app = typer.Typer(help="Tenants, their shares and limits.", no_args_is_help=True)

Weight = Annotated[float, typer.Option(min=0.001, max=1000, help="Its share of the workers against others'.")]
Tier = Annotated[int, typer.Option(min=-100, max=100, help="Lower ones go first, whatever the shares.")]


@tenants_app.command("list")
def list_tenants(
    data_dir: DataDir = DATA_DIR, database: DatabaseUrl = None, pepper: Pepper = None, as_json: AsJson = False
) -> None:
    """All tenants, with the limits of each."""

    async def collect(registry: Registry) -> list[dict[str, Any]]:
        limits = [shown.limit(limit) for limit in await registry.limits("tenant")]
        return [
            {
                **shown.tenant(row),
                "limits": [limit for limit in limits if limit["subject_id"] == row.id],
            }
            for row in await registry.tenants()
        ]

    found = Door(data_dir, database, pepper).read(lambda _, registry: collect(registry))
    if as_json:
        typer.echo(json.dumps({"tenants": found}))
        return
    table = Table("tenant", "name", "active", "weight", "tier", "limits")
    for tenant in found:
        table.add_row(
            tenant["id"],
            tenant["name"],
            "yes" if tenant["is_active"] else "suspended",
            f"{tenant['weight']:g}",
            str(tenant["tier"]),
            "\n".join(_in_words(limit) for limit in tenant["limits"]) or "none",
        )
    Console().print(table)


@tenants_app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Its id, which stays for ever.")],
    name: Annotated[str | None, typer.Option(help="None: its id.")] = None,
    weight: Weight = 1.0,
    tier: Tier = 0,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """A new tenant. `keys create --tenant` makes its first key."""

    async def make(registry: Registry) -> TenantRow:
        return await registry.create_tenant(tenant, name or tenant, weight=weight, tier=tier)

    typer.echo(json.dumps(shown.tenant(Door(data_dir, database, pepper, redis).change(make))))


@tenants_app.command()
def change(
    tenant: str,
    name: Annotated[str | None, typer.Option(help="What it is called.")] = None,
    weight: Annotated[float | None, typer.Option(min=0.001, max=1000, help="Its share.")] = None,
    tier: Annotated[int | None, typer.Option(min=-100, max=100, help="Lower ones go first.")] = None,
    active: Annotated[
        bool | None, typer.Option("--resume/--suspend", help="Whether its keys open anything.")
    ] = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """Rename, weigh, suspend or resume a tenant, on every running gateway at once. What is not given stays."""
    given = {"name": name, "weight": weight, "tier": tier, "is_active": active}
    changes = {field: value for field, value in given.items() if value is not None}

    async def amend(registry: Registry) -> TenantRow:
        return await registry.change_tenant(tenant, changes)

    typer.echo(json.dumps(shown.tenant(Door(data_dir, database, pepper, redis).change(amend))))


@tenants_app.command()
def limit(
    tenant: str,
    model: Annotated[str, typer.Option(help="Only for this model; none: for all together.")] = "",
    requests_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    concurrent_requests: Annotated[int | None, typer.Option(min=0)] = None,
    monthly_budget: Annotated[str | None, typer.Option(help="In the currency of the prices: 12.50")] = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """Set a tenant's limits in the place of what it had; with none given they are lifted."""
    wanted = Limit(
        subject_kind="tenant",
        subject_id=tenant,
        model=model,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        monthly_budget_nano=None if monthly_budget is None else nano(monthly_budget, "--monthly-budget"),
    )

    async def put(registry: Registry) -> Limit:
        return await registry.set_limit(wanted)

    typer.echo(json.dumps(shown.limit(Door(data_dir, database, pepper, redis).change(put))))


def _in_words(limit: dict[str, Any]) -> str:
    measures = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "concurrent_requests": "at once",
        "monthly_budget": "a month",
    }
    parts = [f"{limit[measure]} {words}" for measure, words in measures.items() if limit[measure] is not None]
    return f"{limit['model'] or 'all models'}: " + ", ".join(parts)
