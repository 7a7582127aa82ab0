"""The memory pool as others see and steer it: `/api/pool`, prefixes that all tenants share, and pinned ones."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, json_response
from app.api.body import parse, read_body
from app.api.openapi import json_body
from app.api.prefixes import PREFIX_NAME, Prefix, prefix_tokens
from app.api.schemas import CacheSalt
from app.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from app.requests.chain import chain_of
from app.tenancy.principal import caller
from engine.protocol import WorkerRecord
from memory_pool.async_client import AsyncPoolClient
from memory_pool.keys import namespace_of
from memory_pool.pins import MAX_TTL_S, Pin, TooManyPinsError
from memory_pool.shared_prefixes import SharedPrefix

PrefixName = Annotated[str, msgspec.Meta(pattern=f"^{PREFIX_NAME.pattern}$")]


class NewSharedPrefix(Prefix, frozen=True, kw_only=True):
    """Body of `POST /api/admin/pool/shared`."""

    name: PrefixName


class NewPin(Prefix, frozen=True, kw_only=True):
    """Body of `POST /api/pins`. `tenant`: whose blocks, for administrators; others pin their own."""

    name: PrefixName
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL_S)]
    cache_salt: CacheSalt | None = None
    tenant: str | None = None


class PinView(msgspec.Struct, frozen=True):
    """A pinned prefix. `num_blocks`: the whole blocks of it, which are what is pinned. `ends_in_s` from now."""

    name: str
    namespace: str
    num_tokens: int
    num_blocks: int
    ends_in_s: float


class SharedPrefixView(msgspec.Struct, frozen=True):
    """A prefix open to all tenants. `num_blocks`: the whole blocks of it, which are what is shared."""

    name: str
    fingerprint: str
    num_tokens: int
    num_blocks: int


_new_prefix = msgspec.json.Decoder(NewSharedPrefix)
_new_pin = msgspec.json.Decoder(NewPin)


def pool_router(desk: Desk, pool: AsyncPoolClient) -> APIRouter:
    """The routes over `pool`."""
    router = APIRouter()

    @router.get("/api/pool")
    async def pool_statistics() -> Response:
        """Blocks, bytes, hits, misses and evictions of the pool, by tier and namespace."""
        return json_response(await pool.stats())

    @router.get("/api/admin/pool/shared")
    async def list_shared() -> Response:
        """Prefixes that are open to all tenants."""
        prefixes = await pool.shared_prefixes()
        return json_response({"shared": [_view(name, each) for name, each in sorted(prefixes.items())]})

    @router.post("/api/admin/pool/shared", openapi_extra=json_body(NewSharedPrefix))
    async def share(request: Request) -> Response:
        """Open a prefix to all tenants; one of the same name is replaced."""
        body = parse(await read_body(request, desk.settings.max_body_bytes), _new_prefix)
        model = next(iter(desk.models.values())) if body.model is None else desk.model(body.model)
        layout = desk.generator.dispatcher.layout(model.id)
        tokens = await prefix_tokens(model, body)
        try:
            prefix = SharedPrefix.of(tokens, block_tokens=layout.block_tokens, fingerprint=layout.fingerprint)
        except ValueError as error:
            field = "prompt" if body.messages is None else "messages"
            raise InvalidRequestError(f"{field}: {error}", param=field) from None
        if not await pool.share(body.name, prefix):
            raise UnavailableError("the pool cannot be reached; try again shortly")
        return json_response(_view(body.name, prefix), 201)

    @router.delete("/api/admin/pool/shared/{name}")
    async def unshare(name: str) -> Response:
        """Close a shared prefix; later prompts take their tenants' own blocks."""
        found = await pool.unshare(name)
        if found is None:
            raise _away()
        if not found:
            raise NotFoundError(f"no shared prefix {name!r} is known", param="name")
        return json_response({"name": name, "shared": False})

    @router.get("/api/pins")
    async def list_pins() -> Response:
        """Prefixes that are pinned: the caller's, for administrators all."""
        who, now_ms = caller(), await pool.now_ms()
        if now_ms is None:
            raise _away()
        pins = [pin for pin in await pool.pins() if who.is_admin or pin.namespace == who.namespace]
        return json_response({"pins": [_pin_view(pin, now_ms) for pin in pins if pin.until_ms > now_ms]})

    @router.post("/api/pins", openapi_extra=json_body(NewPin))
    async def pin(request: Request) -> Response:
        """Keep a prefix in DRAM for a while, as long as anything else can go; one of the same name is replaced."""
        body = parse(await read_body(request, desk.settings.max_body_bytes), _new_pin)
        namespace = _namespace(body.tenant)
        tokens, layout = await _tokens(body)
        prefixes = await pool.shared_prefixes()
        chain = chain_of(tokens, layout, prefixes, namespace=namespace, salt=body.cache_salt or "")
        try:
            made = await pool.pin(
                namespace, body.name, num_tokens=len(tokens), keys=chain.keys, ttl_s=body.ttl_s
            )
        except TooManyPinsError as error:
            raise ConflictError(str(error)) from None
        if made is None:
            raise _away()
        return json_response(_pin_view(made, made.until_ms - round(body.ttl_s * 1000)), 201)

    @router.delete("/api/pins/{name}")
    async def unpin(name: str, tenant: str | None = None) -> Response:
        """End a pin before its time."""
        found = await pool.unpin(_namespace(tenant), name)
        if found is None:
            raise _away()
        if not found:
            raise NotFoundError(f"no pin {name!r} is known", param="name")
        return json_response({"name": name, "pinned": False})

    async def _tokens(prefix: Prefix) -> tuple[list[int], WorkerRecord]:
        """The tokens of a prefix, which fill at least one block of the layout that its model's workers have."""
        model = next(iter(desk.models.values())) if prefix.model is None else desk.model(prefix.model)
        layout = desk.generator.dispatcher.layout(model.id)
        tokens = await prefix_tokens(model, prefix)
        if len(tokens) < layout.block_tokens:
            field = "prompt" if prefix.messages is None else "messages"
            raise InvalidRequestError(
                f"{field}: a prefix fills at least one block of {layout.block_tokens} tokens; "
                f"this one has {len(tokens)}",
                param=field,
            )
        return tokens, layout

    return router


def _namespace(tenant: str | None) -> str:
    """Whose blocks are spoken of. Raises PermissionDeniedError."""
    who = caller()
    if tenant is None:
        return who.namespace
    if not who.is_admin:
        raise PermissionDeniedError(
            "tenant is for administrators: leave it out to pin your own", param="tenant"
        )
    return namespace_of(tenant)


def _away() -> UnavailableError:
    return UnavailableError("the pool cannot be reached; try again shortly")


def _pin_view(pin: Pin, now_ms: int) -> PinView:
    return PinView(pin.name, pin.namespace, pin.num_tokens, len(pin.keys), (pin.until_ms - now_ms) / 1000)


def _view(name: str, prefix: SharedPrefix) -> SharedPrefixView:
    return SharedPrefixView(name, prefix.fingerprint, prefix.num_tokens, len(prefix.keys))
