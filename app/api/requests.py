"""`GET /api/requests` and `GET /api/requests/{id}`: what became of requests."""

import asyncio
import contextlib
from typing import Annotated

from fastapi import APIRouter, Query, Response

from app.api.answers import json_response
from app.api.openapi import json_answer
from app.errors import NotFoundError
from app.requests.history import History
from app.requests.record import RecordView
from app.tenancy.principal import caller

REPORTS_S = 2.0
"""How long to wait for reports of workers that are still on their way when the answer is already over."""


def requests_router(history: History) -> APIRouter:
    """The routes over `history`."""
    router = APIRouter()

    @router.get("/api/requests")
    async def list_requests(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> Response:
        """The newest records, those under way first; of other tenants only for administrators."""
        who = caller()
        return json_response(
            {
                "requests": [
                    record.view(for_admin=who.is_admin)
                    for record in history.recent(limit)
                    if who.may_see(record.tenant)
                ]
            }
        )

    @router.get("/api/requests/{request_id}", openapi_extra=json_answer(RecordView))
    async def retrieve_request(request_id: str) -> Response:
        """One record; of a request that has ended, with all reports."""
        record = history.get(request_id)
        if record is None or not caller().may_see(record.tenant):
            raise NotFoundError(
                f"no request {request_id!r} is known (old ones are forgotten)", param="request_id"
            )
        if record.ended_at is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORTS_S):
                    await record.reported()
        return json_response(record.view(for_admin=caller().is_admin))

    return router
