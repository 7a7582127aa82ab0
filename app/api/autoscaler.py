"""`GET /api/autoscaler`: what the autoscaler sees, and which workers it turned."""

from fastapi import APIRouter, Response

from app.api.answers import json_response
from app.matrix.role_switch import RoleSwitch


def autoscaler_router(role_switch: RoleSwitch) -> APIRouter:
    """The route over `role_switch`."""
    router = APIRouter()

    @router.get("/api/autoscaler")
    async def autoscaler() -> Response:
        """Targets, pressure of prefill and of decode (1: the target is just met), and the changes so far."""
        return json_response(role_switch.view())

    return router
