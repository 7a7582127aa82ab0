"""Who is calling and what they may touch. Pure.

The caller of the request being served is at hand everywhere in its task as `caller()`, so that every place that opens
something (a model, a record) can ask, and none has to be handed it.
"""

import fnmatch
import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass, field

from app.admission.ticket import DEFAULT_TENANT
from app.errors import PermissionDeniedError
from app.tenancy.limits import Limit
from memory_pool.keys import namespace_of

TENANT_PATHS = (
    "/v1/*",
    "/tokenize",
    "/detokenize",
    "/api/requests",
    "/api/requests/*",
    "/api/pins",
    "/api/pins/*",
    "/api/usage",
    "/api/me",
)
"""What a key of a tenant opens unless its own scope is narrower; the rest is for administrators."""


@dataclass(frozen=True, kw_only=True)
class Principal:
    """A caller: the tenant it belongs to, and the scopes of the key it showed. None: not restricted."""

    tenant_id: str = DEFAULT_TENANT
    """DEFAULT_TENANT where callers are not told apart: without keys, and with the keys of the settings."""
    tenant_name: str = DEFAULT_TENANT
    user_id: str | None = None
    key_id: str | None = None
    is_admin: bool = False
    models: frozenset[str] | None = None
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] | None = None
    endpoints: tuple[str, ...] | None = None
    expires_at: float | None = None
    """Seconds since the epoch."""
    limits: tuple[Limit, ...] = ()
    weight: float = 1.0
    """The tenant's share of the workers, against the others'."""
    tier: int = 0
    """Tenants of lower tiers go first, whatever the shares."""

    @property
    def namespace(self) -> str:
        """The pool namespace whose blocks this caller finds and is charged for."""
        return namespace_of(None if self.tenant_id == DEFAULT_TENANT else self.tenant_id)

    def check_path(self, path: str) -> None:
        """Raises PermissionDeniedError unless the key opens this path."""
        if not self.is_admin and not any(fnmatch.fnmatchcase(path, allowed) for allowed in TENANT_PATHS):
            raise PermissionDeniedError(
                f"{path} is for administrators: this key belongs to a tenant", code="admin_only"
            )
        if self.endpoints is not None and not any(fnmatch.fnmatchcase(path, p) for p in self.endpoints):
            raise PermissionDeniedError(
                f"this key does not open {path}; it opens: {', '.join(self.endpoints)}",
                code="endpoint_not_allowed",
            )

    def check_address(self, address: str | None) -> None:
        """Raises PermissionDeniedError unless the key may be used from this IP address."""
        if self.networks is None:
            return
        try:
            caller = ipaddress.ip_address(address or "")
        except ValueError:
            caller = None
        mapped = getattr(caller, "ipv4_mapped", None)
        caller = mapped or caller
        if caller is None or not any(caller in network for network in self.networks):
            raise PermissionDeniedError(
                f"this key may not be used from {address or 'an unknown address'}", code="ip_not_allowed"
            )

    def is_metered(self, model: str) -> bool:
        """Whether tokens of this model are limited, by number or by cost."""
        return any(
            limit.speaks_of(model)
            and (limit.tokens_per_minute is not None or limit.monthly_budget_nano is not None)
            for limit in self.limits
        )

    def may_use(self, model: str) -> bool:
        """Whether the key opens this model."""
        return self.models is None or model in self.models

    def check_model(self, model: str) -> None:
        """Raises PermissionDeniedError unless the key opens this model."""
        if not self.may_use(model):
            raise PermissionDeniedError(
                f"this key does not open the model {model!r}", param="model", code="model_not_allowed"
            )

    def may_see(self, tenant_id: str) -> bool:
        """Whether records of this tenant are the caller's to see."""
        return self.is_admin or tenant_id == self.tenant_id


OPERATOR = Principal(is_admin=True)
"""Whoever calls while no key is needed, and the bearers of the keys in the settings: may do everything."""


@dataclass(eq=False)
class Call:
    """One request's caller, and the headers that its answer is to carry."""

    principal: Principal
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


_CALL: ContextVar[Call] = ContextVar("call")


def enter(call: Call) -> None:
    """From here on this task serves `call`."""
    _CALL.set(call)


def current_call() -> Call:
    """The call this task serves; outside of one, the operator's."""
    return _CALL.get(None) or Call(OPERATOR)


def caller() -> Principal:
    """Who this task serves."""
    return current_call().principal
