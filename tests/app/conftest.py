"""A whole gateway on a real port with echo workers behind real WebSockets, on one event loop."""

import asyncio
import contextlib
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvicorn

from app.gateway import create_app
from app.models import catalogue
from app.requests.served import ServedModel
from app.settings import Settings
from app.text import load_text
from memory_pool.directory import DirectoryError
from tests.app.echo_worker import EchoWorker

MODEL = "smollm2-135m"


@dataclass
class FakeDirectory:
    """A directory of the given workers, which can be made unreadable."""

    workers: list[EchoWorker] = field(default_factory=list)
    is_broken: bool = False

    async def members(self) -> Mapping[str, bytes]:
        if self.is_broken:
            raise DirectoryError("broken on purpose")
        return {worker.id: msgspec.msgpack.encode(worker.record()) for worker in self.workers}


class FakePool:
    """A pool of which every lookup finds `num_blocks`."""

    num_blocks = 0

    async def lookup(
        self, keys: Sequence[bytes], namespace: str = "default", *, num_shared_blocks: int = 0
    ) -> int:
        return min(self.num_blocks, len(keys))

    async def shared_prefixes(self) -> dict[str, Any]:
        return {}

    async def stats(self) -> dict[str, int]:
        return {"blocks": 0}


@dataclass
class Gateway:
    """A running gateway and what stands behind it."""

    url: str
    app: Any
    workers: list[EchoWorker]
    directory: FakeDirectory
    pool: FakePool
    http: httpx.AsyncClient
    sdk: openai.AsyncOpenAI
    server: uvicorn.Server

    async def until_ready(self, status: int = 200) -> None:
        deadline = time.monotonic() + 10
        while (await self.http.get("/readyz")).status_code != status:
            assert time.monotonic() < deadline, "the gateway did not become ready"
            await asyncio.sleep(0.01)

    async def record(self, request_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/api/requests/{request_id}")
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result


@pytest.fixture(scope="session")
def served() -> ServedModel:
    entry = catalogue.pull(MODEL)
    return ServedModel(entry, load_text(entry), 1_700_000_000)


@contextlib.asynccontextmanager
async def serving(
    served: ServedModel, workers: Sequence[EchoWorker], *, ready: bool = True, **settings: Any
) -> AsyncIterator[Gateway]:
    """A gateway over these workers, on a free port."""
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.running())
        directory, pool = FakeDirectory(list(workers)), FakePool()
        data_dir = stack.enter_context(tempfile.TemporaryDirectory())
        options: Any = {"data_dir": data_dir, "directory_poll_s": 0.02, "failover_s": 2.0, **settings}
        app = create_app(
            Settings(**options),
            models={served.id: served},
            directory=directory,
            pool=pool,  # type: ignore[arg-type]  # stands in for the client
        )
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none")
        )
        task = asyncio.create_task(server.serve(sockets=[listening]))
        stack.push_async_callback(_stop, server, task)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20, trust_env=False))
        sdk = openai.AsyncOpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
        stack.push_async_callback(sdk.close)
        gateway = Gateway(url, app, list(workers), directory, pool, http, sdk, server)
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        if ready:
            await gateway.until_ready()
        yield gateway


async def _stop(server: uvicorn.Server, task: asyncio.Task[None]) -> None:
    server.should_exit = True
    await task


def disaggregated(**more: Any) -> list[EchoWorker]:
    return [EchoWorker("prefill-0", "prefill", **more), EchoWorker("decode-0", "decode", **more)]


@pytest.fixture
async def gateway(served: ServedModel) -> AsyncIterator[Gateway]:
    async with serving(served, disaggregated()) as running:
        yield running
