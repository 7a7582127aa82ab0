"""The gateway's application: wires its parts together, nothing else."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import version

import httpx
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app import tasks
from app.admission.admission import Admission
from app.admission.gate import Gate
from app.api.admission import admission_router
from app.api.answers import Desk
from app.api.autoscaler import autoscaler_router
from app.api.chat import chat_router
from app.api.completions import completions_router
from app.api.middleware import READABLE_HEADERS, Entrance, install_error_handlers
from app.api.models import models_router
from app.api.openapi import DocumentedApp
from app.api.ops import ops_router
from app.api.pool import pool_router
from app.api.requests import requests_router
from app.api.responses import responses_router
from app.api.shortcut import Shortcut
from app.api.sse import Pulse
from app.api.tokens import tokens_router
from app.api.workers import workers_router
from app.matrix.autoscaler import Policy
from app.matrix.role_switch import RoleSwitch
from app.metrics import GatewayMetrics
from app.models import catalogue
from app.requests.generation import Generator
from app.requests.history import History
from app.requests.request_log import RequestLog
from app.requests.served import ServedModel
from app.routing.dispatcher import Dispatcher
from app.routing.link import Connect, open_websocket
from app.routing.peers import GROUP, Peers
from app.routing.scorers import warm_link_costs
from app.routing.workers import DirectoryReader, Workers
from app.settings import Settings
from app.tenancy.admin import admin_router
from app.tenancy.tenancy import Tenancy, has_keys
from app.text import load_text
from memory_pool.async_client import AsyncPoolClient
from memory_pool.directory import AsyncDirectory
from observe.traces import new_tracer


class ConfigurationError(ValueError):
    """The settings do not fit together; the message says what to change."""


def create_app(
    settings: Settings,
    *,
    models: Mapping[str, ServedModel] | None = None,
    directory: DirectoryReader | None = None,
    pool: AsyncPoolClient | None = None,
    open_channel: Connect = open_websocket,
    http_transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """The application over `settings`; the other arguments replace what reaches out of the process.

    Raises ConfigurationError, and what loading the model's text raises.
    """
    if settings.key_required and not settings.api_keys and not has_keys(settings):
        raise ConfigurationError(
            f"listening on {settings.host}, which others can reach, needs API keys: make one with `cloudmatrix keys "
            "create`, set CLOUDMATRIX_API_KEYS to one or more keys separated by commas, or listen on 127.0.0.1"
        )
    served = dict(models) if models is not None else load_models(settings)
    own_directory = AsyncDirectory(settings.redis_url) if directory is None else None
    own_pool = AsyncPoolClient(settings.redis_url, disk_folder=settings.pool_disk) if pool is None else None
    memory_pool = pool if own_pool is None else own_pool
    reader = directory if own_directory is None else own_directory
    assert memory_pool is not None
    assert reader is not None
    metrics = GatewayMetrics(next(iter(served)))
    history = History(settings.history_size)
    workers = Workers(reader, poll_s=settings.directory_poll_s, open_channel=open_channel)
    own_id = f"gateway-{secrets.token_hex(4)}"
    gateways = AsyncDirectory(settings.redis_url, group=GROUP) if directory is None else None
    peers = Peers(gateways, own_id)
    gate = new_gate(settings, workers, peers, metrics)
    dispatcher = Dispatcher(
        workers,
        gate=gate,
        failover_s=settings.failover_s,
        retry_after_s=settings.retry_after_s,
        peers=peers,
    )
    peers.load, peers.learn = dispatcher.load, dispatcher.learn_prefill
    metrics.watch(dispatcher, workers, peers)
    tenancy = Tenancy(settings)
    tracer = new_tracer(settings.otel, service="cloudmatrix-gateway", instance=own_id)
    request_log = None if settings.request_log is None else RequestLog(settings.request_log)
    generator = Generator(
        dispatcher=dispatcher,
        gate=gate,
        pool=memory_pool,
        history=history,
        metrics=metrics,
        tenancy=tenancy,
        tracer=tracer,
        request_log=request_log,
    )
    pulse = Pulse()
    desk = Desk(settings=settings, models=served, generator=generator, metrics=metrics, pulse=pulse)
    client = httpx.AsyncClient(timeout=30, trust_env=False, transport=http_transport)
    targets = Policy(ttft_target_s=settings.autoscale_ttft_s, tpot_target_s=settings.autoscale_tpot_s)
    role_switch = RoleSwitch(workers, history, client, targets, enabled=settings.autoscale)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warm_link_costs()
        parts = (workers, dispatcher, gate, pulse, role_switch, peers)
        await tenancy.start()
        running = [asyncio.create_task(part.run()) for part in parts]
        try:
            yield
        finally:
            await tasks.end(running)
            await client.aclose()
            await tenancy.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)
            if request_log is not None:
                request_log.close()
            for owned in (own_directory, own_pool, gateways):
                if owned is not None:
                    await owned.close()

    app = DocumentedApp(
        title="cloudmatrix",
        version=version("cloudmatrix"),
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
        },  # the service's own: observe/, app/metrics.py
    )
    app.state.tenancy = tenancy
    answering = (chat_router(desk), completions_router(desk), responses_router(desk))
    app.include_router(ops_router(workers, metrics))
    for router in answering:
        app.include_router(router)
    app.include_router(models_router(desk))
    app.include_router(tokens_router(desk))
    app.include_router(requests_router(history))
    app.include_router(admin_router(tenancy))
    app.include_router(admission_router(gate))
    app.include_router(autoscaler_router(role_switch))
    app.include_router(workers_router(workers, client))
    app.include_router(pool_router(desk, memory_pool))
    install_error_handlers(app)
    app.add_middleware(Shortcut, routers=answering)
    app.add_middleware(Entrance, tenancy=tenancy, metrics=metrics, is_traced=tracer is not None)
    if settings.cors_origins:
        # Outermost: a browser's preflight has no key, and refusals, too, must be readable for the page.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=READABLE_HEADERS,
        )
    return app


def new_gate(settings: Settings, workers: Workers, peers: Peers, metrics: GatewayMetrics) -> Gate:
    """The queue in front of the workers."""
    admission = Admission(
        max_requests=settings.max_in_flight,
        max_queued_per_tenant=settings.max_queued_per_tenant,
        ttft_target_s=settings.ttft_target_s,
        tpot_target_s=settings.tpot_target_s,
    )
    return Gate(
        admission,
        capacity=lambda: peers.capacity(workers.capacity(settings.max_sequences_per_worker)),
        clock=time.monotonic,
        retry_after_s=settings.retry_after_s,
        on_reject=metrics.rejected,
    )


def load_models(settings: Settings) -> dict[str, ServedModel]:
    """The configured model's text side. Raises ModelError when it is not in the catalogue."""
    entry = catalogue.resolve(settings.model)
    return {entry.id: ServedModel(entry, load_text(entry), int(time.time()))}
