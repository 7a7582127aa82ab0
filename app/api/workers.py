"""Workers as operators see and steer them: `/api/workers`."""

import httpx
import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import json_response
from app.api.body import parse, read_body
from app.api.openapi import json_answer, json_body
from app.api.schemas import RoleChange
from app.errors import ConflictError, NotFoundError, UnavailableError
from app.routing.workers import Worker, Workers
from engine.protocol import Location

MAX_BODY_BYTES = 4096

_role_decoder = msgspec.json.Decoder(RoleChange)


class WorkerView(msgspec.Struct, frozen=True):
    """One worker. `connected`: this gateway holds an open link to it; `in_flight`: its requests over that link."""

    id: str
    role: str
    state: str
    model: str
    pid: int
    url: str
    location: Location
    running: int
    waiting: int
    queued_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    connected: bool
    in_flight: int


def workers_router(workers: Workers, client: httpx.AsyncClient) -> APIRouter:
    """The routes; `client` reaches the workers' own HTTP surface."""
    router = APIRouter()

    @router.get("/api/workers")
    async def list_workers() -> Response:
        """Every known worker."""
        return json_response({"workers": [_view(worker) for worker in workers.all()]})

    @router.get("/api/workers/{worker_id}", openapi_extra=json_answer(WorkerView))
    async def retrieve_worker(worker_id: str) -> Response:
        """One worker."""
        return json_response(_view(_known(worker_id)))

    @router.post("/api/workers/{worker_id}/role", openapi_extra=json_body(RoleChange, WorkerView))
    async def change_role(worker_id: str, request: Request) -> Response:
        """Let a worker prefill, decode, or both; what it has is finished first."""
        change = parse(await read_body(request, MAX_BODY_BYTES), _role_decoder)
        return await _forward(_known(worker_id), "role", msgspec.json.encode(change))

    @router.post("/api/workers/{worker_id}/drain", openapi_extra=json_answer(WorkerView))
    async def drain(worker_id: str) -> Response:
        """Send it nothing new; it finishes what it has."""
        return await _forward(_known(worker_id), "drain", b"{}")

    def _known(worker_id: str) -> Worker:
        worker = workers.get(worker_id)
        if worker is None:
            raise NotFoundError(f"no worker {worker_id!r} is known", param="worker_id")
        return worker

    async def _forward(worker: Worker, verb: str, body: bytes) -> Response:
        url = f"{worker.record.url.rstrip('/')}/{verb}"
        try:
            answer = await client.post(url, content=body, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            raise UnavailableError(f"worker {worker.record.id} does not answer: {error}") from None
        if answer.is_error:
            raise ConflictError(f"worker {worker.record.id} refuses: {answer.text[:500]}")
        await workers.refresh()
        return json_response(_view(workers.get(worker.record.id) or worker))

    return router


def _view(worker: Worker) -> WorkerView:
    record = worker.record
    return WorkerView(
        id=record.id,
        role=record.role,
        state=record.state,
        model=record.model,
        pid=record.pid,
        url=record.url,
        location=record.location,
        running=record.running,
        waiting=record.waiting,
        queued_tokens=record.queued_tokens,
        kv_blocks_used=record.kv_blocks_used,
        kv_blocks_total=record.kv_blocks_total,
        connected=worker.link.is_open,
        in_flight=worker.link.num_in_flight,
    )
