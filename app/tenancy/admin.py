"""`/api/admin/…`: tenants, users, keys, limits, prices and usage. For keys of administrators alone."""

import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.tenancy import shown
from app.tenancy.limits import Limit
from app.tenancy.prices import Price, to_nano
from app.tenancy.principal import caller
from app.tenancy.tenancy import Tenancy
from app.tenancy.usage import groups_of, usage

Name = Annotated[str, Field(min_length=1, max_length=200)]
MONEY = r"^[0-9]{1,7}([.][0-9]{1,12})?$"
Count = Annotated[int, Field(ge=0, le=10**12)]
Names = Annotated[list[Name], Field(max_length=100)]


def _plainly_written(amount: object) -> object:
    if isinstance(amount, str) and not re.fullmatch(MONEY, amount):
        raise ValueError("must be a decimal number, such as 0.15")
    return amount


Money = Annotated[
    Decimal,
    Field(ge=0, le=1_000_000, strict=False),  # JSON has no decimals of its own
    BeforeValidator(_plainly_written),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1_000_000},
                {"type": "string", "pattern": MONEY},
            ]
        }
    ),
]
"""An amount of the currency: a number, or a string, which keeps all its digits."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewTenant(_Body):
    """A tenant; `weight` is its share of the workers, lower `tier`s go first."""

    id: Name
    name: Name | None = None
    weight: float = Field(default=1.0, gt=0, le=1000)
    tier: int = Field(default=0, ge=-100, le=100)


class TenantChange(_Body):
    """What is given is changed."""

    name: Name | None = None
    weight: float | None = Field(default=None, gt=0, le=1000)
    tier: int | None = Field(default=None, ge=-100, le=100)
    is_active: bool | None = None


class NewUser(_Body):
    """A user of a tenant."""

    name: Name
    email: Annotated[str, Field(max_length=320)] | None = None


class UserChange(_Body):
    """What is given is changed."""

    name: Name | None = None
    is_active: bool | None = None


class NewKey(_Body):
    """A key and its scopes; null leaves a scope open. `expires_at`: seconds since the epoch."""

    tenant_id: Name
    name: Name
    user_id: str | None = None
    is_admin: bool = False
    models: Names | None = None
    networks: Names | None = None
    endpoints: Names | None = None
    expires_at: Annotated[int, Field(ge=0, le=2**40)] | None = None


class KeyChange(_Body):
    """What is given is changed; null opens a scope again, or lets the key live for ever."""

    name: Name = ""
    is_admin: bool = False
    models: Names | None = None
    networks: Names | None = None
    endpoints: Names | None = None
    expires_at: Annotated[int, Field(ge=0, le=2**40)] | None = None


class LimitBody(_Body):
    """Limits of a subject, on one model or (model empty) on all together; null: unlimited."""

    subject_kind: Literal["tenant", "user", "key"]
    subject_id: Name
    model: Annotated[str, Field(max_length=200)] = ""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_requests: Count | None = None
    monthly_budget: Money | None = None


class PriceBody(_Body):
    """Prices of a million tokens."""

    input: Money
    cached_input: Money
    output: Money


def admin_router(tenancy: Tenancy) -> APIRouter:
    """The routes over `tenancy`."""
    router = APIRouter(tags=["admin"])

    @router.get("/api/admin/tenants")
    async def list_tenants() -> dict[str, Any]:
        """All tenants."""
        return {"tenants": [shown.tenant(row) for row in await tenancy.registry.tenants()]}

    @router.post("/api/admin/tenants", status_code=201)
    async def create_tenant(body: NewTenant) -> dict[str, Any]:
        """A new tenant; its id stays for ever."""
        row = await tenancy.registry.create_tenant(
            body.id, body.name or body.id, weight=body.weight, tier=body.tier
        )
        return shown.tenant(row)

    @router.post("/api/admin/tenants/{tenant_id}")
    async def change_tenant(tenant_id: str, body: TenantChange) -> dict[str, Any]:
        """Rename, weigh, suspend (`is_active: false`) or resume a tenant."""
        row = await tenancy.registry.change_tenant(tenant_id, _given(body))
        await tenancy.authenticator.changed()
        return shown.tenant(row)

    @router.get("/api/admin/tenants/{tenant_id}/users")
    async def list_users(tenant_id: str) -> dict[str, Any]:
        """A tenant's users."""
        await tenancy.registry.tenant(tenant_id)
        return {"users": [shown.user(row) for row in await tenancy.registry.users(tenant_id)]}

    @router.post("/api/admin/tenants/{tenant_id}/users", status_code=201)
    async def create_user(tenant_id: str, body: NewUser) -> dict[str, Any]:
        """A new user."""
        return shown.user(await tenancy.registry.create_user(tenant_id, body.name, body.email))

    @router.post("/api/admin/users/{user_id}")
    async def change_user(user_id: str, body: UserChange) -> dict[str, Any]:
        """Rename, suspend or resume a user."""
        row = await tenancy.registry.change_user(user_id, _given(body))
        await tenancy.authenticator.changed()
        return shown.user(row)

    @router.get("/api/admin/keys")
    async def list_keys(tenant_id: str | None = None) -> dict[str, Any]:
        """Keys, by what may be shown of them."""
        return {"keys": [shown.key(row) for row in await tenancy.registry.keys(tenant_id)]}

    @router.post("/api/admin/keys", status_code=201)
    async def create_key(body: NewKey) -> dict[str, Any]:
        """A new key. This answer is the only place where it is shown."""
        issued = await tenancy.registry.issue_key(**body.model_dump())
        await tenancy.authenticator.changed()
        return {**shown.key(issued.row), "key": issued.key}

    @router.post("/api/admin/keys/{key_id}")
    async def change_key(key_id: str, body: KeyChange) -> dict[str, Any]:
        """Rename a key, widen or narrow its scopes, move its expiry: on every gateway at once."""
        row = await tenancy.registry.change_key(key_id, body.model_dump(exclude_unset=True))
        await tenancy.authenticator.changed()
        return shown.key(row)

    @router.post("/api/admin/keys/{key_id}/revoke")
    async def revoke_key(key_id: str) -> dict[str, Any]:
        """End a key, on every gateway at once."""
        row = await tenancy.registry.revoke_key(key_id)
        await tenancy.authenticator.changed()
        return shown.key(row)

    @router.get("/api/admin/limits")
    async def list_limits() -> dict[str, Any]:
        """All limits."""
        return {"limits": [shown.limit(limit) for limit in await tenancy.registry.limits()]}

    @router.post("/api/admin/limits")
    async def set_limit(body: LimitBody) -> dict[str, Any]:
        """Set a subject's limits; with all of them null they are removed."""
        values = body.model_dump(exclude={"monthly_budget"})
        budget = None if body.monthly_budget is None else to_nano(body.monthly_budget)
        limit = await tenancy.registry.set_limit(Limit(**values, monthly_budget_nano=budget))
        await tenancy.authenticator.changed()
        return shown.limit(limit)

    @router.get("/api/admin/prices")
    async def list_prices() -> dict[str, Any]:
        """Prices of a million tokens, by model."""
        return {
            "prices": {
                model: shown.price(price) for model, price in (await tenancy.registry.prices()).items()
            }
        }

    @router.post("/api/admin/prices/{model}")
    async def set_price(model: str, body: PriceBody) -> dict[str, Any]:
        """Set a model's price; requests that ended keep theirs."""
        price = Price(to_nano(body.input), to_nano(body.cached_input), to_nano(body.output))
        await tenancy.registry.set_price(model, price)
        await tenancy.authenticator.changed()
        return shown.price(price)

    @router.delete("/api/admin/prices/{model}")
    async def delete_price(model: str) -> dict[str, Any]:
        """From now on requests to the model cost nothing; those that ended keep their price."""
        await tenancy.registry.delete_price(model)
        await tenancy.authenticator.changed()
        return {"model": model, "deleted": True}

    @router.get("/api/admin/usage")
    async def summarise_usage(
        group_by: Annotated[str, Query(description="Comma-separated: tenant, user, key, model, day, …")] = "",
        first_day: date | None = None,
        last_day: date | None = None,
        tenant: str | None = None,
        key: str | None = None,
        model: str | None = None,
    ) -> dict[str, Any]:
        """What was used, from the ledger."""
        rows = await usage(
            tenancy.database,
            groups_of(group_by),
            first_day=first_day.isoformat() if first_day else None,
            last_day=last_day.isoformat() if last_day else None,
            tenant=tenant,
            key=key,
            model=model,
        )
        return {"usage": rows}

    @router.get("/api/usage")
    async def own_usage(group_by: str = "model,day") -> dict[str, Any]:
        """What the caller's tenant used."""
        return {"usage": await usage(tenancy.database, groups_of(group_by), tenant=caller().tenant_id)}

    @router.get("/api/me")
    async def own_key() -> dict[str, Any]:
        """Who the caller is: tenant, what the key opens, and its limits with what is used of them now."""
        principal = caller()
        limits = [shown.standing(each) for each in await tenancy.quota.standing(principal)]
        return {**shown.principal(principal), "limits": limits}

    return router


def _given(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(exclude_none=True)
