"""The tables of tenancy. Instants are whole seconds since the epoch, UTC; money is in nano units of one currency.

Rows that the ledger refers to are never deleted: a tenant or user is suspended, a key revoked.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {int: BigInteger, dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 - as SQLAlchemy has it


class TenantRow(Base):
    """Who is billed. The id is chosen by the administrator and stays."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    is_active: Mapped[bool] = mapped_column(Boolean, default=True)
    weight: Mapped[float] = mapped_column(Float, default=1.0)
    tier: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[int]


class UserRow(Base):
    """A person or program of a tenant, to whom keys are given."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    email: Mapped[str | None] = mapped_column(String(320))
    is_active: Mapped[bool] = mapped_column(Boolean, default=True)
    created_at: Mapped[int]


class KeyRow(Base):
    """An API key: what it opens and how to know it again, never the key itself."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    """HMAC-SHA-256 of the key under the pepper, hex."""
    prefix: Mapped[str] = mapped_column(String(16))
    last_four: Mapped[str] = mapped_column(String(4))
    is_admin: Mapped[bool] = mapped_column(Boolean, default=False)
    models: Mapped[list[str] | None]
    networks: Mapped[list[str] | None]
    endpoints: Mapped[list[str] | None]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    revoked_at: Mapped[int | None]
    last_used_at: Mapped[int | None]


class LimitRow(Base):
    """What a tenant, user or key may use; model '' is all of them together."""

    __tablename__ = "limits"

    subject_kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    subject_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    model: Mapped[str] = mapped_column(String(200), primary_key=True, default="")
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    concurrent_requests: Mapped[int | None]
    monthly_budget_nano: Mapped[int | None]


class PriceRow(Base):
    """What a million tokens of a model cost."""

    __tablename__ = "prices"

    model: Mapped[str] = mapped_column(String(200), primary_key=True)
    input_nano: Mapped[int]
    cached_input_nano: Mapped[int]
    output_nano: Mapped[int]


class UsageRow(Base):
    """The ledger: one row a request that was admitted. `cached_tokens` is null where no worker said."""

    __tablename__ = "usage"

    request_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    ended_at: Mapped[int]
    day: Mapped[str] = mapped_column(String(10))
    tenant_id: Mapped[str] = mapped_column(String(63))
    user_id: Mapped[str | None] = mapped_column(String(40))
    key_id: Mapped[str | None] = mapped_column(String(40))
    model: Mapped[str] = mapped_column(String(200))
    endpoint: Mapped[str] = mapped_column(String(40))
    status: Mapped[str] = mapped_column(String(16))
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int | None]
    completion_tokens: Mapped[int]
    cost_nano: Mapped[int]

    __table_args__ = (
        Index("ix_usage_tenant_day", "tenant_id", "day"),
        Index("ix_usage_key_day", "key_id", "day"),
        Index("ix_usage_day", "day"),
    )


class FactRow(Base):
    """Small facts of the whole database, such as which pepper its keys were hashed under."""

    __tablename__ = "facts"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    value: Mapped[str] = mapped_column(String(200))
