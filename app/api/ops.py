"""`/healthz`, `/readyz`, `/metrics`: for supervisors and Prometheus, open without a key."""

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.answers import json_response
from app.api.openapi import json_answer
from app.metrics import GatewayMetrics
from app.routing.workers import Workers


class Readiness(msgspec.Struct, frozen=True):
    """`missing`: which of prefill and decode no worker can serve now."""

    status: str
    missing: list[str]


def ops_router(workers: Workers, metrics: GatewayMetrics) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/healthz")
    @router.get("/health")
    async def healthz() -> Response:
        """200 while the process answers. `/health` is vLLM's name, which load generators ask for."""
        return json_response({"status": "alive"})

    @router.get("/readyz", openapi_extra=json_answer(Readiness, status=503))
    async def readyz() -> Response:
        """200 while a prefill and a decode worker, or one that does both, can serve; else 503 with what is missing."""
        missing = missing_roles(workers)
        if missing:
            return json_response(Readiness("not ready", missing), 503)
        return json_response(Readiness("ready", []))

    @router.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Prometheus' text format."""
        return Response(metrics.expose(), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def missing_roles(workers: Workers) -> list[str]:
    """Which of prefill and decode no routable worker serves."""
    roles = {worker.record.role for worker in workers.all() if worker.is_routable}
    return [role for role in ("prefill", "decode") if role not in roles and "both" not in roles]
