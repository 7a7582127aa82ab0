"""The memory pool as operators see and steer it: `/api/pool`, and prefixes that all tenants share."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, json_response
from app.api.body import parse, read_body
from app.api.openapi import json_body
from app.api.prefixes import Prefix, prefix_tokens
from app.errors import InvalidRequestError, NotFoundError, UnavailableError
from memory_pool.async_client import AsyncPoolClient
from memory_pool.shared_prefixes import SharedPrefix

PrefixName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class NewSharedPrefix(Prefix, frozen=True, kw_only=True):
    """Body of `POST /api/admin/pool/shared`."""

    name: PrefixName


class SharedPrefixView(msgspec.Struct, frozen=True):
    """A prefix open to all tenants. `num_blocks`: the whole blocks of it, which are what is shared."""

    name: str
    fingerprint: str
    num_tokens: int
    num_blocks: int


_new_prefix = msgspec.json.Decoder(NewSharedPrefix)


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
            raise UnavailableError("the pool cannot be reached; try again shortly")
        if not found:
            raise NotFoundError(f"no shared prefix {name!r} is known", param="name")
        return json_response({"name": name, "shared": False})

    return router


def _view(name: str, prefix: SharedPrefix) -> SharedPrefixView:
    return SharedPrefixView(name, prefix.fingerprint, prefix.num_tokens, len(prefix.keys))
