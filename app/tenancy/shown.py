"""What of tenants, users, keys, limits and prices may be shown, as the admin API and the commands show it. Pure."""

from typing import Any

from app.tenancy.limits import Limit
from app.tenancy.prices import Price, from_nano
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


def price(of_model: Price) -> dict[str, str]:
    """Prices of a million tokens."""
    return {
        "input": str(from_nano(of_model.input_nano)),
        "cached_input": str(from_nano(of_model.cached_input_nano)),
        "output": str(from_nano(of_model.output_nano)),
    }
