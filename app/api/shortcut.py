"""Straight to the endpoint: requests for answers pass by the framework's routing and injection, which they do not need.

The framework tries one route after another and builds exit stacks, dependencies and two layers of error handling around
every call: a seventh of what a whole answer costs the gateway. These endpoints take a request and give a response, and
what they raise is the entrance's to answer, which stands around this layer.
"""

from collections.abc import Iterable

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


class Shortcut:
    """The ASGI layer before the framework's own. Of `routers`, the routes without parameters in their paths."""

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]) -> None:
        self._app = app
        self._routes = {
            (method, route.path): route
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as the framework does; the count of answers goes by it
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)
