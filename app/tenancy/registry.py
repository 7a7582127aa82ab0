"""Tenants, users, keys, limits and prices in the database: every change that an administrator makes.

What cannot be done raises InvalidRequestError, ConflictError or NotFoundError, which name the field at fault.
"""

import ipaddress
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import ConflictError, InvalidRequestError, NotFoundError
from app.tenancy.database import Database
from app.tenancy.keys import digest_of, new_key, shown_of
from app.tenancy.limits import Limit, SubjectKind
from app.tenancy.prices import Price
from app.tenancy.tables import Base, KeyRow, LimitRow, PriceRow, TenantRow, UserRow

_TENANT_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_Row = TypeVar("_Row", bound=Base)


@dataclass(frozen=True)
class IssuedKey:
    """A new key: the only time that it is seen."""

    key: str
    row: KeyRow


@dataclass(frozen=True)
class KeyInForce:
    """A key with whom it belongs to and every limit that speaks of them."""

    key: KeyRow
    tenant: TenantRow
    user: UserRow | None
    limits: tuple[Limit, ...]


class Registry:
    """Over one database; `pepper` is what keys are hashed under."""

    def __init__(self, database: Database, pepper: bytes) -> None:
        self._database = database
        self._pepper = pepper

    async def create_tenant(self, tenant_id: str, name: str, *, weight: float, tier: int) -> TenantRow:
        """A new tenant."""
        if not _TENANT_ID.fullmatch(tenant_id):
            raise InvalidRequestError(
                "id: up to 63 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit", param="id"
            )
        async with self._database.session() as session:
            if await session.get(TenantRow, tenant_id) is not None:
                raise ConflictError(f"id: the tenant {tenant_id!r} exists", param="id")
            row = TenantRow(
                id=tenant_id, name=name, weight=weight, tier=tier, is_active=True, created_at=_now()
            )
            session.add(row)
            return row

    async def tenants(self) -> Sequence[TenantRow]:
        """All of them, by id."""
        async with self._database.session() as session:
            return (await session.scalars(select(TenantRow).order_by(TenantRow.id))).all()

    async def tenant(self, tenant_id: str) -> TenantRow:
        """One tenant."""
        async with self._database.session() as session:
            return await _get(session, TenantRow, tenant_id, "tenant", "tenant_id")

    async def change_tenant(self, tenant_id: str, changes: dict[str, Any]) -> TenantRow:
        """Set `name`, `weight`, `tier` or `is_active`."""
        async with self._database.session() as session:
            row = await _get(session, TenantRow, tenant_id, "tenant", "tenant_id")
            for name, value in changes.items():
                setattr(row, name, value)
            return row

    async def create_user(self, tenant_id: str, name: str, email: str | None) -> UserRow:
        """A new user of a tenant."""
        async with self._database.session() as session:
            await _get(session, TenantRow, tenant_id, "tenant", "tenant_id")
            row = UserRow(
                id=_new_id("usr"),
                tenant_id=tenant_id,
                name=name,
                email=email,
                is_active=True,
                created_at=_now(),
            )
            session.add(row)
            return row

    async def users(self, tenant_id: str | None) -> Sequence[UserRow]:
        """Those of a tenant, or all, oldest first."""
        query = select(UserRow).order_by(UserRow.created_at, UserRow.id)
        if tenant_id is not None:
            query = query.where(UserRow.tenant_id == tenant_id)
        async with self._database.session() as session:
            return (await session.scalars(query)).all()

    async def change_user(self, user_id: str, changes: dict[str, Any]) -> UserRow:
        """Set `name`, `email` or `is_active`."""
        async with self._database.session() as session:
            row = await _get(session, UserRow, user_id, "user", "user_id")
            for name, value in changes.items():
                setattr(row, name, value)
            return row

    async def issue_key(
        self,
        tenant_id: str,
        name: str,
        *,
        user_id: str | None = None,
        is_admin: bool = False,
        models: list[str] | None = None,
        networks: list[str] | None = None,
        endpoints: list[str] | None = None,
        expires_at: int | None = None,
    ) -> IssuedKey:
        """A new key, which nobody can show again."""
        _check_expiry(expires_at)
        key = new_key()
        prefix, last_four = shown_of(key)
        async with self._database.session() as session:
            await _get(session, TenantRow, tenant_id, "tenant", "tenant_id")
            if user_id is not None:
                user = await _get(session, UserRow, user_id, "user", "user_id")
                if user.tenant_id != tenant_id:
                    raise InvalidRequestError(
                        f"user_id: {user_id} belongs to another tenant", param="user_id"
                    )
            row = KeyRow(
                id=_new_id("key"),
                tenant_id=tenant_id,
                user_id=user_id,
                name=name,
                digest=digest_of(key, self._pepper),
                prefix=prefix,
                last_four=last_four,
                is_admin=is_admin,
                models=models,
                networks=_networks(networks),
                endpoints=endpoints,
                created_at=_now(),
                expires_at=expires_at,
            )
            session.add(row)
        return IssuedKey(key, row)

    async def keys(self, tenant_id: str | None) -> Sequence[KeyRow]:
        """Those of a tenant, or all, oldest first; revoked ones too."""
        query = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        if tenant_id is not None:
            query = query.where(KeyRow.tenant_id == tenant_id)
        async with self._database.session() as session:
            return (await session.scalars(query)).all()

    async def change_key(self, key_id: str, changes: dict[str, Any]) -> KeyRow:
        """Set `name`, `is_admin`, `models`, `networks`, `endpoints` or `expires_at`."""
        _check_expiry(changes.get("expires_at"))
        if "networks" in changes:
            changes = {**changes, "networks": _networks(changes["networks"])}
        async with self._database.session() as session:
            row = await _get(session, KeyRow, key_id, "key", "key_id")
            for name, value in changes.items():
                setattr(row, name, value)
            return row

    async def revoke_key(self, key_id: str) -> KeyRow:
        """From now on nobody gets in with this key; revoking again changes nothing."""
        async with self._database.session() as session:
            row = await _get(session, KeyRow, key_id, "key", "key_id")
            row.revoked_at = row.revoked_at or _now()
            return row

    async def find_key(self, digest: str) -> KeyInForce | None:
        """What belongs to a key's digest, whatever its state; None when there is no such key."""
        query = (
            select(KeyRow, TenantRow, UserRow)
            .join(TenantRow, KeyRow.tenant_id == TenantRow.id)
            .join(UserRow, KeyRow.user_id == UserRow.id, isouter=True)
            .where(KeyRow.digest == digest)
        )
        async with self._database.session() as session:
            found = (await session.execute(query)).one_or_none()
            if found is None:
                return None
            key, tenant, user = found
            about = [("tenant", tenant.id), ("key", key.id)] + ([("user", user.id)] if user else [])
            return KeyInForce(key, tenant, user, await _limits_of(session, about))

    async def has_keys(self) -> bool:
        """Whether any key is in force."""
        async with self._database.session() as session:
            query = select(KeyRow.id).where(KeyRow.revoked_at.is_(None)).limit(1)
            return await session.scalar(query) is not None

    async def set_limit(self, limit: Limit) -> Limit:
        """Set the limit of a subject (on a model); one without any measure is removed."""
        row_type = {"tenant": TenantRow, "user": UserRow, "key": KeyRow}[limit.subject_kind]
        async with self._database.session() as session:
            await _get(session, row_type, limit.subject_id, limit.subject_kind, "subject_id")
            await session.execute(
                delete(LimitRow).where(
                    LimitRow.subject_kind == limit.subject_kind,
                    LimitRow.subject_id == limit.subject_id,
                    LimitRow.model == limit.model,
                )
            )
            measures = {name: getattr(limit, name) for name in _MEASURES}
            if any(value is not None for value in measures.values()):
                session.add(
                    LimitRow(
                        subject_kind=limit.subject_kind,
                        subject_id=limit.subject_id,
                        model=limit.model,
                        **measures,
                    )
                )
        return limit

    async def limits(self, kind: SubjectKind | None = None, subject_id: str | None = None) -> list[Limit]:
        """All limits, or those of one kind or subject."""
        query = select(LimitRow).order_by(LimitRow.subject_kind, LimitRow.subject_id, LimitRow.model)
        if kind is not None:
            query = query.where(LimitRow.subject_kind == kind)
        if subject_id is not None:
            query = query.where(LimitRow.subject_id == subject_id)
        async with self._database.session() as session:
            return [_limit(row) for row in (await session.scalars(query)).all()]

    async def set_price(self, model: str, price: Price) -> None:
        """What requests cost from now on."""
        row = PriceRow(
            model=model,
            input_nano=price.input_nano,
            cached_input_nano=price.cached_input_nano,
            output_nano=price.output_nano,
        )
        async with self._database.session() as session:
            await session.merge(row)

    async def delete_price(self, model: str) -> None:
        """From now on requests cost nothing."""
        async with self._database.session() as session:
            await session.delete(await _get(session, PriceRow, model, "price of", "model"))

    async def prices(self) -> dict[str, Price]:
        """By model."""
        async with self._database.session() as session:
            rows = (await session.scalars(select(PriceRow).order_by(PriceRow.model))).all()
        return {row.model: Price(row.input_nano, row.cached_input_nano, row.output_nano) for row in rows}


_MEASURES = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "monthly_budget_nano")


async def _limits_of(session: AsyncSession, subjects: Sequence[tuple[str, str]]) -> tuple[Limit, ...]:
    about: list[ColumnElement[bool]] = [
        (LimitRow.subject_kind == kind) & (LimitRow.subject_id == name) for kind, name in subjects
    ]
    return tuple(_limit(row) for row in (await session.scalars(select(LimitRow).where(or_(*about)))).all())


def _limit(row: LimitRow) -> Limit:
    measures: dict[str, int | None] = {name: getattr(row, name) for name in _MEASURES}
    kind: Any = row.subject_kind
    return Limit(subject_kind=kind, subject_id=row.subject_id, model=row.model, **measures)


async def _get(session: AsyncSession, kind: type[_Row], row_id: str, noun: str, param: str) -> _Row:
    row = await session.get(kind, row_id)
    if row is None:
        raise NotFoundError(f"{param}: there is no {noun} {row_id!r}", param=param)
    return row


def _check_expiry(expires_at: int | None) -> None:
    if expires_at is not None and expires_at <= _now():
        raise InvalidRequestError("expires_at: lies in the past", param="expires_at")


def _networks(networks: list[str] | None) -> list[str] | None:
    if networks is None:
        return None
    checked = []
    for place, network in enumerate(networks):
        try:
            checked.append(str(ipaddress.ip_network(network)))
        except ValueError as error:
            raise InvalidRequestError(
                f"networks[{place}]: {error}; expected an address or a range such as 10.1.0.0/16",
                param=f"networks[{place}]",
            ) from None
    return checked


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"


def _now() -> int:
    return int(time.time())
