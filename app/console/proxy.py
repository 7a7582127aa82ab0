"""The console's server: its own static page, and everything the page asks passed on to the gateway.

The page and the API then share one origin, so the gateway needs no cross-origin rule, and the console can run on
another machine than the gateway.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
PASSED_ON = ("authorization", "content-type", "accept", "x-request-id")
BROUGHT_BACK = ("content-type", "x-request-id", "retry-after", "retry-after-ms", "cache-control")
CONTENT_SECURITY_POLICY = "default-src 'self'; style-src 'self'; script-src 'self'; frame-ancestors 'none'"


def create_console(gateway_url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> FastAPI:
    """The console over the gateway at `gateway_url`; `transport` replaces the network in tests."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        timeout = httpx.Timeout(600, connect=5)
        async with httpx.AsyncClient(
            base_url=gateway_url, timeout=timeout, transport=transport, trust_env=False
        ) as client:
            app.state.client = client
            yield

    app = FastAPI(
        title="cloudmatrix console", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )

    @app.api_route("/api/{rest:path}", methods=["GET", "POST", "DELETE"])
    @app.api_route("/v1/{rest:path}", methods=["GET", "POST"])
    @app.api_route("/readyz", methods=["GET"])
    async def pass_on(request: Request) -> Response:
        client: httpx.AsyncClient = app.state.client
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        outgoing = client.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode()),
            headers=headers,
            content=await request.body(),
        )
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.HTTPError:
            message = "The gateway does not answer."
            error = {"message": message, "type": "server_error", "param": None, "code": "gateway_unreachable"}
            return JSONResponse({"error": error}, status_code=502)
        kept = {name: answer.headers[name] for name in BROUGHT_BACK if name in answer.headers}
        return StreamingResponse(
            _body(answer), status_code=answer.status_code, headers=kept, media_type=kept.get("content-type")
        )

    @app.middleware("http")
    async def guard(request: Request, call_next):  # type: ignore[no-untyped-def]  # starlette's own untyped hook
        response = await call_next(request)
        response.headers["content-security-policy"] = CONTENT_SECURITY_POLICY
        response.headers["x-content-type-options"] = "nosniff"
        return response

    app.mount("/", StaticFiles(directory=STATIC, html=True), name="static")
    return app


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    finally:
        await answer.aclose()
