"""What of tenants, users, keys, limits and prices may be shown, as the admin API and the commands show it. Pure."""

from typing import Any

from app.tenancy.limits import Limit
from app.tenancy.prices import Price, from_nano
from app.tenancy.principal import Principal
from app.tenancy.quota import Standing
from app.tenancy.tables import KeyRow, TenantRow, UserRow


def tenant(row: TenantRow) -> dict[str, Any]:
    """A tenant."""
    return {name: getattr(row, name) for name in ("id", "name", "is_active", "weight", "tier", "created_at")}


def user(row: UserRow) -> dict[str, Any]:
    """A user."""
    return {
        name: getattr(row, name) for name in ("id", "tenant_id", "name", "email", "is_active", "created_at")
    }


def key(row: KeyRow) -> dict[str, Any]:
    """A key, by its beginning and end."""
    names = (
        "id", "tenant_id", "user_id", "name", "is_admin", "models", "networks", "endpoints",
        "created_at", "expires_at", "revoked_at", "last_used_at",
    )  # fmt: skip
    return {**{name: getattr(row, name) for name in names}, "shown": f"{row.prefix}…{row.last_four}"}


def limit(row: Limit) -> dict[str, Any]:
    """A limit; its budget as a decimal number in a string."""
    budget = row.monthly_budget_nano
    return {
        "subject_kind": row.subject_kind,
        "subject_id": row.subject_id,
        "model": row.model,
        "requests_per_minute": row.requests_per_minute,
        "tokens_per_minute": row.tokens_per_minute,
        "concurrent_requests": row.concurrent_requests,
        "monthly_budget": None if budget is None else str(from_nano(budget)),
    }


def standing(of_limit: Standing) -> dict[str, Any]:
    """A limit and what is used of it: requests and tokens of the last minute, the month's spending."""
    spent = of_limit.spent_nano
    return {
        **limit(of_limit.limit),
        "requests_used": of_limit.requests,
        "tokens_used": of_limit.tokens,
        "spent": None if spent is None else str(from_nano(spent)),
    }


def principal(of_caller: Principal) -> dict[str, Any]:
    """A caller and what its key opens; null is not restricted."""
    models, networks = of_caller.models, of_caller.networks
    return {
        "tenant": {"id": of_caller.tenant_id, "name": of_caller.tenant_name},
        "user_id": of_caller.user_id,
        "key_id": of_caller.key_id,
        "is_admin": of_caller.is_admin,
        "models": None if models is None else sorted(models),
        "networks": None if networks is None else [str(network) for network in networks],
        "endpoints": None if of_caller.endpoints is None else list(of_caller.endpoints),
        "expires_at": of_caller.expires_at,
    }


def price(of_model: Price) -> dict[str, str]:
    """Prices of a million tokens."""
    return {
        "input": str(from_nano(of_model.input_nano)),
        "cached_input": str(from_nano(of_model.cached_input_nano)),
        "output": str(from_nano(of_model.output_nano)),
    }
