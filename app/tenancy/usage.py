"""Sums over the ledger."""

from typing import Any, Literal

from sqlalchemy import Select, func, select

from app.errors import InvalidRequestError
from app.tenancy.database import Database
from app.tenancy.prices import from_nano
from app.tenancy.tables import UsageRow

Group = Literal["tenant", "user", "key", "model", "day", "endpoint", "status"]
_COLUMNS = {
    "tenant": UsageRow.tenant_id,
    "user": UsageRow.user_id,
    "key": UsageRow.key_id,
    "model": UsageRow.model,
    "day": UsageRow.day,
    "endpoint": UsageRow.endpoint,
    "status": UsageRow.status,
}


def groups_of(text: str) -> list[Group]:
    """Comma-separated names, each once. Raises InvalidRequestError."""
    groups: list[Any] = [part.strip() for part in text.split(",") if part.strip()]
    for group in groups:
        if group not in _COLUMNS:
            raise InvalidRequestError(
                f"group_by: {group!r} is none of {', '.join(_COLUMNS)}", param="group_by"
            )
    return list(dict.fromkeys(groups))


async def usage(
    database: Database,
    groups: list[Group],
    *,
    first_day: str | None = None,
    last_day: str | None = None,
    tenant: str | None = None,
    key: str | None = None,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """One row for each combination of the groups, in their order; without groups one row of totals."""
    columns = [_COLUMNS[group].label(group) for group in groups]
    sums = [
        func.count().label("requests"),
        func.coalesce(func.sum(UsageRow.prompt_tokens), 0).label("prompt_tokens"),
        func.coalesce(func.sum(UsageRow.cached_tokens), 0).label("cached_tokens"),
        func.coalesce(func.sum(UsageRow.completion_tokens), 0).label("completion_tokens"),
        func.coalesce(func.sum(UsageRow.cost_nano), 0).label("cost_nano"),
    ]
    query: Select[Any] = select(*columns, *sums).group_by(*columns).order_by(*columns)
    for column, value in (
        (UsageRow.tenant_id, tenant),
        (UsageRow.key_id, key),
        (UsageRow.model, model),
    ):
        if value is not None:
            query = query.where(column == value)
    if first_day is not None:
        query = query.where(UsageRow.day >= first_day)
    if last_day is not None:
        query = query.where(UsageRow.day <= last_day)
    async with database.session() as session:
        found = (await session.execute(query)).mappings().all()
    numbers = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    return [
        {
            **{group: row[group] for group in groups},
            **{name: int(row[name]) for name in numbers},
            "cost": str(from_nano(int(row["cost_nano"]))),
        }
        for row in found
    ]
