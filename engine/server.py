"""A worker process: `python -m engine.server --role … --model-path … --redis URL`.

HTTP on a loopback port of its own choice, which the directory tells: `/link` (WebSocket, the gateways), `/healthz`,
`/metrics`, `/state`, `POST /drain`, `POST /role`. SIGTERM and SIGINT drain, a second one ends at once.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import uvicorn
from fastapi import FastAPI, HTTPException, Response, WebSocket
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from engine.lifeline import exit_with_parent
from engine.protocol import Location, Role
from engine.scheduler import Limits
from engine.service import Options, PublishTime, WorkerService
from observe import logs
from observe.traces import VARIABLE as TRACES_VARIABLE
from observe.traces import mode_of

log = logging.getLogger(__name__)

DRAIN_DEADLINE_S = 20.0
DEFAULT_KV_BYTES = 1 << 30
MAX_MESSAGE_BYTES = 64 << 20
REDIS_VARIABLE = "CLOUDMATRIX_REDIS_URL"
POOL_DISK_VARIABLE = "CLOUDMATRIX_POOL_DISK"


class DrainBody(BaseModel):
    """Body of `POST /drain`. `deadline_s` None: however long it takes."""

    deadline_s: float | None = Field(default=None, ge=0)


class RoleBody(BaseModel):
    """Body of `POST /role`."""

    role: Role


def create_app(service: WorkerService) -> FastAPI:
    """The worker's HTTP surface."""
    app = FastAPI(title="cloudmatrix worker", openapi_url=None)

    @app.websocket("/link")
    async def link(websocket: WebSocket) -> None:
        await service.links.serve(websocket)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "state": service.state}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/state")
    async def state() -> dict[str, Any]:
        record: dict[str, Any] = msgspec.to_builtins(service.record())
        return {**record, "links": service.links.num_open}

    @app.post("/drain", status_code=202)
    async def drain(body: DrainBody | None = None) -> dict[str, str]:
        service.begin_exit((body or DrainBody()).deadline_s)
        return {"state": service.state}

    @app.post("/role", status_code=202)
    async def role(body: RoleBody) -> dict[str, str]:
        try:
            service.begin_role(body.role)
        except ValueError as error:
            raise HTTPException(409, str(error)) from error
        return {"state": service.state, "role": body.role}

    return app


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`, which drains before it stops the server."""
        yield


async def serve(
    options: Options, listening: socket.socket, drain_deadline_s: float = DRAIN_DEADLINE_S
) -> int:
    """Run a worker on a bound socket until it is told to end; the process's exit status."""
    host, port = listening.getsockname()[:2]
    service = WorkerService(options, url=f"http://{host}:{port}")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.begin_exit, drain_deadline_s)
    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=None,  # the gateway pings
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    starting = asyncio.create_task(service.start())
    ended = asyncio.create_task(service.ended.wait())
    try:
        await asyncio.wait({serving, starting, ended}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.exception():
            await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        elif starting.done():
            log.error("cannot start: %s", starting.exception())
            return 1
    finally:
        ended.cancel()
        await service.close()
        server.should_exit = True
        await serving
    return 1 if service.failure else 0


def _location(text: str) -> Location:
    try:
        node, npu, die = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE/NPU/DIE, e.g. 12/3/1") from None
    if not (0 <= node < 48 and 0 <= npu < 8 and 0 <= die < 2):
        raise argparse.ArgumentTypeError(f"{text!r}: nodes are 0 to 47, NPUs 0 to 7, dies 0 to 1")
    return Location(node=node, npu=npu, die=die)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(prog="python -m engine.server", description="A cloudmatrix worker.")
    add = parser.add_argument
    add("--id", required=True, help="name of this worker, one of its kind in the directory")
    add("--role", required=True, choices=get_args(Role))
    add("--model", required=True, help="name under which the model is served")
    add("--model-path", required=True, type=Path, help="GGUF file or Hugging Face folder")
    add(
        "--location",
        type=_location,
        default=Location(node=0, npu=0, die=0),
        help="NODE/NPU/DIE on the supernode",
    )
    add("--redis", default=os.environ.get(REDIS_VARIABLE), help=f"URL of the pool (or {REDIS_VARIABLE})")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0: a free one")
    add("--threads", type=_positive, default=os.cpu_count() or 1, help="of the kernels")
    add("--kernels", default="auto", help="auto, or a kernel set by name")
    add("--kv-bytes", type=_positive, default=DEFAULT_KV_BYTES, help="memory for KV blocks")
    add("--max-context", type=_positive, help="tokens of prompt and output together, at most the model's")
    add("--max-running", type=_positive, default=limits.max_running, help="sequences that hold KV at a time")
    add("--max-waiting", type=_positive, default=limits.max_waiting, help="sequences in the queue")
    add("--max-step-tokens", type=_positive, default=limits.max_step_tokens, help="rows of a prefill step")
    add("--tpot-target", type=_seconds, help="seconds a decode step may take; prompts get what it leaves")
    add("--no-speculation", action="store_true", help="never guess tokens ahead")
    add(
        "--pool-disk",
        type=Path,
        default=os.environ.get(POOL_DISK_VARIABLE) or None,
        help=f"folder of the pool's disk tier, where a keeper of this machine writes (or {POOL_DISK_VARIABLE})",
    )
    add("--no-pool", action="store_true", help="neither read KV from the pool nor write any there")
    add(
        "--publish",
        choices=get_args(PublishTime),
        default="auto",
        help="hand KV over while the rest of the prompt is computed, or after the first token; "
        "auto: early where the kernels leave a core over",
    )
    add("--drain-deadline", type=_seconds, default=DRAIN_DEADLINE_S, help="seconds from SIGTERM to giving up")
    add("--log-format", default=os.environ.get(logs.VARIABLE, "text"), help="text or json")
    add("--otel", default=os.environ.get(TRACES_VARIABLE, "off"), help="spans go to: off, console or otlp")
    add("--nice", type=int, default=0, help="lower priority by this much")
    add("--exit-with-parent", action="store_true", help="end when the process that started this one is gone")
    return parser


def main() -> None:
    """The process's entry point."""
    parser = _parser()
    args = parser.parse_args()
    if args.exit_with_parent:
        exit_with_parent()
    if not args.redis:
        parser.error(f"--redis or {REDIS_VARIABLE} is needed: workers meet and share KV there")
    if args.nice:
        os.nice(args.nice)
    try:
        logs.configure(args.log_format, process=args.id)
        traces = mode_of(args.otel)
    except ValueError as error:
        parser.error(str(error))
    options = Options(
        id=args.id,
        role=args.role,
        model=args.model,
        model_path=args.model_path,
        location=args.location,
        redis_url=args.redis,
        threads=args.threads,
        kv_bytes=args.kv_bytes,
        limits=Limits(
            max_running=args.max_running,
            max_waiting=args.max_waiting,
            max_step_tokens=args.max_step_tokens,
            tpot_target_s=args.tpot_target,
        ),
        max_context_tokens=args.max_context,
        kernels=args.kernels,
        speculate=not args.no_speculation,
        pool_disk=args.pool_disk,
        use_pool=not args.no_pool,
        publish=args.publish,
        traces=traces,
    )
    listening = socket.create_server((args.host, args.port))
    # Short switches: the engine thread comes back from a kernel and should not wait 5 ms for the interpreter.
    sys.setswitchinterval(0.0005)
    runner = asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory())
    with runner:
        sys.exit(runner.run(serve(options, listening, args.drain_deadline)))


if __name__ == "__main__":
    main()
