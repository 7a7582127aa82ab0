"""Around every answer: a request id, the key check, and the error envelope for whatever goes wrong inside."""

import logging
import secrets
import time

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.unserved import not_served
from app.errors import (
    GatewayError,
    HeadersTooLargeError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
)
from app.metrics import GatewayMetrics
from app.requests.mailbox import Abandoned
from app.tenancy.principal import OPERATOR, Call, Principal, enter
from app.tenancy.tenancy import Tenancy
from observe import logs, traces

log = logging.getLogger(__name__)

OPEN_PATHS = ("/healthz", "/health", "/readyz", "/metrics", "/docs", "/redoc", "/openapi.json")
"""Paths that need no key: for supervisors, Prometheus, and readers of the documentation."""

MAX_HEADER_BYTES = 32 << 10
"""Of all names and values together: four times what most servers take, and a bound on what a check has to read."""

_MEASURES = [
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
]
READABLE_HEADERS = ["x-request-id", "retry-after", "retry-after-ms", "x-should-retry", *_MEASURES]
"""Headers of answers that pages of other origins may read."""


class Entrance:
    """The outermost ASGI layer."""

    def __init__(
        self, app: ASGIApp, tenancy: Tenancy, metrics: GatewayMetrics, *, is_traced: bool = False
    ) -> None:
        self._app = app
        self._tenancy = tenancy
        self._metrics = metrics
        self._is_traced = is_traced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _tidied(scope)
        request_id = "req_" + secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"], state["arrived_at"] = request_id, time.monotonic()
        logs.request_id.set(request_id)
        if self._is_traced:
            traces.incoming.set((_header(scope, b"traceparent"), _header(scope, b"tracestate")))
        call = Call(OPERATOR)
        id_header = (b"x-request-id", request_id.encode())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] += [id_header, *call.headers]
                route = scope.get("route")
                self._metrics.answered(getattr(route, "path", "unknown"), message["status"])
            await send(message)

        try:
            _check_headers(scope)
            if scope["path"] not in OPEN_PATHS:
                call.principal = await self._identify(scope)
            enter(call)
            await self._app(scope, receive, send_with_id)
        except GatewayError as error:
            await error_response(error)(scope, receive, send_with_id)
        except (ClientDisconnect, Abandoned):
            return
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            await error_response(_unforeseen())(scope, receive, send_with_id)

    async def _identify(self, scope: Scope) -> Principal:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        client = scope.get("client")
        return await self._tenancy.authenticator.identify(given, client[0] if client else None, scope["path"])


def _tidied(scope: Scope) -> Scope:
    """A slash at the end means nothing, and HEAD is GET whose body the server leaves out."""
    path = scope["path"].rstrip("/") or "/"
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _check_headers(scope: Scope) -> None:
    num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > MAX_HEADER_BYTES:
        raise HeadersTooLargeError(f"headers of {num_bytes} bytes: at most {MAX_HEADER_BYTES} are taken")


def error_response(error: GatewayError) -> Response:
    """An error as an HTTP answer."""
    response = Response(error.encode(), error.status, media_type="application/json")
    response.raw_headers.extend(error.headers())
    return response


def install_error_handlers(app: FastAPI) -> None:
    """Give the framework's own errors the envelope."""

    async def gateway_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, GatewayError)
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(_from_http(request, error))
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response

    async def validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(InvalidRequestError(f"{param}: {first['msg']}", param=param))

    app.add_exception_handler(GatewayError, gateway_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def _from_http(request: Request, error: HTTPException) -> GatewayError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return not_served(request.method, request.url.path)
    if error.status_code == 405:
        return MethodNotAllowedError(f"{where}: this method is not allowed here")
    if error.status_code < 500:
        return InvalidRequestError(str(error.detail))
    return _unforeseen()


def _unforeseen() -> InternalError:
    return InternalError("the gateway failed; its log has the details under this request's id")
