"""The worker's HTTP surface, link and life, over a real socket and a real Redis, on the fake model."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import msgspec
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect

from engine.config import KVLayout
from engine.protocol import (
    Cancel,
    Failed,
    Finished,
    FromWorker,
    Location,
    Prefilled,
    SamplingParams,
    Submit,
    Tokens,
    WorkerRecord,
    decode_from_worker,
    encode,
)
from engine.scheduler import Limits
from engine.server import create_app
from engine.service import Engine, Options, WorkerService, die_of, publishes_early
from memory_pool.directory import AsyncDirectory
from tests.engine.fakes import BLOCK_TOKENS, FINGERPRINT, GRAMMARS, FakeModel, expected

PROMPT = [5, 9, 2, 7, 7, 1, 30, 4, 11]


class Running:
    """A worker service with its HTTP server in this event loop."""

    def __init__(self, redis_url: str) -> None:
        self.model = FakeModel(64)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        options = Options(
            id="w1",
            role="both",
            model="fake",
            model_path=Path("none"),
            location=Location(node=2, npu=1, die=1),
            redis_url=redis_url,
            threads=1,
            kv_bytes=1,
            limits=Limits(),
            speculate=False,  # a guess that is computed and thrown away would show in the counters
        )
        self.service = WorkerService(options, url=self.url, load=self._load)
        self.server = uvicorn.Server(
            uvicorn.Config(
                create_app(self.service), log_level="warning", lifespan="off", ws="websockets-sansio"
            )
        )
        self.directory = AsyncDirectory(redis_url)

    def _load(self, options: Options) -> Engine:
        return Engine(
            forward=self.model.forward,
            memory=self.model.memory,
            close=lambda: None,
            layout=KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=BLOCK_TOKENS),
            fingerprint=FINGERPRINT,
            num_blocks=64,
            max_context_tokens=1000,
            grammars=GRAMMARS,
        )

    async def record(self) -> WorkerRecord | None:
        data = (await self.directory.members()).get("w1")
        return None if data is None else msgspec.msgpack.decode(data, type=WorkerRecord)


@pytest.fixture
async def running(redis_url: str) -> AsyncIterator[Running]:
    running = Running(redis_url)
    serving = asyncio.create_task(running.server.serve(sockets=[running.socket]))
    await running.service.start()
    yield running
    await running.service.close()
    running.server.should_exit = True
    await serving
    await running.directory.close()


async def until(condition: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        await asyncio.sleep(0.005)


def submit(request_id: str, *, max_tokens: int = 8, phase: str = "both") -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0)
    return Submit(request_id=request_id, phase=phase, prompt_tokens=PROMPT, sampling=sampling)  # type: ignore[arg-type]  # a test's word for a role


def link(running: Running) -> connect:
    return connect(running.url.replace("http", "ws") + "/link", compression=None, proxy=None)


async def events_of(socket: ClientConnection, *request_ids: str) -> dict[str, list[FromWorker]]:
    events: dict[str, list[FromWorker]] = {request_id: [] for request_id in request_ids}
    over: set[str] = set()
    async with asyncio.timeout(10):
        while over < set(request_ids):
            for event in decode_from_worker(await socket.recv(decode=False)):
                events[event.request_id].append(event)
                if isinstance(event, Finished | Failed | Prefilled):
                    over.add(event.request_id)
    return events


def tokens(events: list[FromWorker]) -> list[int]:
    return [t for e in events if isinstance(e, Tokens) for t in e.token_ids]


async def test_requests_over_one_link(running: Running) -> None:
    async with link(running) as socket:
        await socket.send(encode([submit(f"r{i}", max_tokens=3 + i) for i in range(5)]))
        events = await events_of(socket, *(f"r{i}" for i in range(5)))
    for i in range(5):
        assert tokens(events[f"r{i}"]) == expected(PROMPT, 3 + i)


async def test_a_closed_link_frees_what_came_over_it(running: Running) -> None:
    async with link(running) as socket:
        await socket.send(encode([submit("r", max_tokens=900)]))
        await socket.recv()
    await until(lambda: running.service.record().kv_blocks_used == 0)
    assert running.service.record().running == 0


async def test_cancel_answers_with_what_was_done(running: Running) -> None:
    async with link(running) as socket:
        await socket.send(encode([submit("r", max_tokens=900)]))
        await socket.recv()
        await socket.send(encode([Cancel(request_id="r")]))
        events = await events_of(socket, "r")
    last = events["r"][-1]
    assert isinstance(last, Finished)
    assert last.finish_reason == "abort"
    assert last.report.phases[0].phase == "queue"


@pytest.mark.parametrize("garbage", [b"\x93nonsense", b"", "text"])
async def test_a_peer_of_another_tongue_is_shown_out(running: Running, garbage: bytes | str) -> None:
    async with link(running) as socket:
        await socket.send(garbage)
        await asyncio.wait_for(socket.wait_closed(), 5)
        assert socket.close_code == 1002
    async with link(running) as socket:
        await socket.send(encode([submit("r")]))
        assert tokens((await events_of(socket, "r"))["r"]) == expected(PROMPT, 8)


async def test_the_directory_knows_the_worker(running: Running) -> None:
    record = None
    async with asyncio.timeout(5):
        while record is None or record.state != "ready":
            record = await running.record()
    assert (record.role, record.url, record.pid) == ("both", running.url, os.getpid())
    assert (record.fingerprint, record.block_tokens, record.kv_bytes_per_token) == (FINGERPRINT, 4, 12)
    assert (record.kv_blocks_used, record.kv_blocks_total) == (0, 64)
    assert record.max_context_tokens == 256  # what the cache holds is less than the 1,000 of the model
    await running.service.close()
    assert await running.record() is None


async def test_http_surface(running: Running) -> None:
    async with link(running) as socket, httpx.AsyncClient(base_url=running.url, trust_env=False) as client:
        await socket.send(encode([submit("r", max_tokens=6)]))
        await events_of(socket, "r")
        assert (await client.get("/healthz")).json() == {"status": "ok", "state": "ready"}
        state = (await client.get("/state")).json()
        assert state["location"] == {"node": 2, "npu": 1, "die": 1}
        assert state["links"] == 1
        text = (await client.get("/metrics")).text
        samples = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert samples["vllm:prompt_tokens_total"] == len(PROMPT)
    assert samples["vllm:generation_tokens_total"] == 6
    assert samples["cloudmatrix_computed_tokens_total"] == len(PROMPT) + 5
    assert samples["vllm:kv_cache_usage_perc"] == 0
    assert samples["vllm:request_success_total"] == 1


async def test_drain_finishes_what_runs_and_ends(running: Running) -> None:
    async with link(running) as socket, httpx.AsyncClient(base_url=running.url, trust_env=False) as client:
        await socket.send(encode([submit("r", max_tokens=200)]))
        await socket.recv()
        assert (await client.post("/drain")).status_code == 202
        await socket.send(encode([submit("late")]))
        events = await events_of(socket, "r", "late")
    assert len(tokens(events["r"])) >= 190
    assert isinstance(events["r"][-1], Finished)
    late = events["late"][-1]
    assert isinstance(late, Failed)
    assert late.code == "draining"
    await asyncio.wait_for(running.service.ended.wait(), 10)


async def test_drain_gives_up_at_its_deadline(running: Running) -> None:
    async with link(running) as socket:
        await socket.send(encode([submit("r", max_tokens=240)]))
        await socket.recv()
        running.model.forward_delay_s = 0.05
        running.service.begin_exit(deadline_s=0.1)
        await asyncio.wait_for(running.service.ended.wait(), 5)
    assert running.service.record().running == 1


async def test_role_changes_through_a_drain(running: Running) -> None:
    async with link(running) as socket, httpx.AsyncClient(base_url=running.url, trust_env=False) as client:
        await socket.send(encode([submit("r", max_tokens=100)]))
        await socket.recv()
        assert (await client.post("/role", json={"role": "decode"})).status_code == 202
        assert (await client.post("/role", json={"role": "prefill"})).status_code == 409
        events = await events_of(socket, "r")
        assert isinstance(events["r"][-1], Finished)
        await until(lambda: running.service.state == "ready")
        assert running.service.record().role == "decode"
        await socket.send(encode([submit("r2")]))
        assert tokens((await events_of(socket, "r2"))["r2"]) == expected(PROMPT, 8)
        assert (await client.post("/role", json={"role": "none"})).status_code == 422


async def test_a_directory_that_is_down_stops_nobody(tmp_path: Path) -> None:
    running = Running(f"unix://{tmp_path}/nobody.sock")
    serving = asyncio.create_task(running.server.serve(sockets=[running.socket]))
    await running.service.start()
    async with link(running) as socket:
        await socket.send(encode([submit("r", phase="prefill"), submit("r2")]))
        events = await events_of(socket, "r", "r2")
    assert isinstance(events["r"][-1], Prefilled)
    assert tokens(events["r2"]) == expected(PROMPT, 8)
    await running.service.close()
    running.server.should_exit = True
    await serving
    with contextlib.suppress(Exception):
        await running.directory.close()


async def test_a_dead_engine_ends_the_process(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(running.service._worker, "_send", broken)
    async with link(running) as socket:
        await socket.send(encode([submit("r")]))
        await asyncio.wait_for(running.service.ended.wait(), 5)
    assert isinstance(running.service.failure, RuntimeError)


def test_places() -> None:
    # 16 dies a node, 2 a package: 2 · 16 + 1 · 2 + 1.
    assert die_of(Location(node=2, npu=1, die=1)) == "die:35"


def test_kv_is_handed_over_early_where_the_kernels_leave_a_core() -> None:
    assert publishes_early("auto", threads=2, num_cores=3)
    assert not publishes_early("auto", threads=2, num_cores=2)
    assert publishes_early("early", threads=2, num_cores=2)
    assert not publishes_early("late", threads=1, num_cores=8)
