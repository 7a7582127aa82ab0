"""Who goes next, through a whole gateway: fair shares, priorities, deadlines, and clients that stop waiting."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.requests.served import ServedModel
from memory_pool.redis_server import RedisServer, start_redis
from tests.app.conftest import MODEL, Gateway, serving
from tests.app.echo_worker import EchoWorker

ADMIN = {"authorization": "Bearer operator-key"}


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"), maxmemory_bytes=64 << 20)
    yield server
    server.stop()


@pytest.fixture
async def gateway(served: ServedModel, redis_server: RedisServer) -> AsyncIterator[Gateway]:
    """One worker that takes two sequences at a time; the others wait in the gateway."""
    workers = [EchoWorker("both-0", "both", step_s=0.002)]
    settings = {"redis_url": redis_server.url, "api_keys": "operator-key", "max_sequences_per_worker": 2}
    async with serving(served, workers, **settings) as running:
        running.http.timeout = httpx.Timeout(60)
        yield running


async def new_key(gateway: Gateway, tenant: str, **tenancy: Any) -> str:
    for path, body in [
        ("tenants", {"id": tenant, **tenancy}),
        ("keys", {"tenant_id": tenant, "name": "test"}),
    ]:
        answer = await gateway.http.post(f"/api/admin/{path}", json=body, headers=ADMIN)
        assert answer.status_code == 201, answer.text
    return str(answer.json()["key"])


async def ask(
    gateway: Gateway, key: str, headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    asked = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 8, "ignore_eos": True, **body}
    headers = {"authorization": f"Bearer {key}", **(headers or {})}
    return await gateway.http.post("/v1/completions", json=asked, headers=headers)


async def metric(gateway: Gateway, name: str, **labels: str) -> float | None:
    """A sample of the gateway's exposition."""
    wanted = name + ("{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else "")
    for line in (await gateway.http.get("/metrics")).text.splitlines():
        if line.startswith(wanted + " "):
            return float(line.rpartition(" ")[2])
    return None


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


async def until_queued(gateway: Gateway, fits: Callable[[int], bool]) -> None:
    """Until so many requests wait in the gateway."""
    deadline = time.monotonic() + 10
    while True:
        lines = (await gateway.http.get("/metrics")).text.splitlines()
        rows = [line for line in lines if line.startswith("cloudmatrix_requests_queued{")]
        if fits(number := round(sum(float(row.rpartition(" ")[2]) for row in rows))):
            return
        assert time.monotonic() < deadline, f"{number} requests wait"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
async def test_a_greedy_tenant_takes_no_more_than_its_share(
    gateway: Gateway, weight: float, share: float
) -> None:
    names = f"greedy-{weight:g}", f"modest-{weight:g}"
    greedy = await new_key(gateway, names[0])
    modest = await new_key(gateway, names[1], weight=weight)
    order: list[str] = []

    async def one(key: str, name: str) -> None:
        answer = await ask(gateway, key)
        assert answer.status_code == 200, answer.text
        order.append(name)

    worker = gateway.workers[0]
    worker.is_held, worker.step_s = True, 0.004
    async with asyncio.TaskGroup() as group:
        # The greedy one was there first, with everything it has.
        for _ in range(62):
            group.create_task(one(greedy, names[0]))
        await until_queued(gateway, (60).__eq__)
        for _ in range(30):
            group.create_task(one(modest, names[1]))
        await until_queued(gateway, (90).__eq__)
        view = (await gateway.http.get("/api/admission", headers=ADMIN)).json()
        assert (view["queued"], view["sequences_released"]) == (90, 2)
        assert {row["tenant"]: row["queued"] for row in view["tenants"]} == {names[0]: 60, names[1]: 30}
        worker.is_held = False
        await until(lambda: order.count(names[1]) >= 24, "the modest tenant is served")
        index = await metric(gateway, "cloudmatrix_fairness_index")
        view = (await gateway.http.get("/api/admission", headers=ADMIN)).json()
        assert view["fairness_index"] == pytest.approx(index, abs=0.1)
    # Up to its 24th answer the modest one got its share of all.
    place = [number for number, name in enumerate(order, 1) if name == names[1]][23]
    assert 24 / place == pytest.approx(share, abs=0.1)
    assert index is not None
    assert index >= 0.9


async def test_priority_orders_a_tenants_own_requests(gateway: Gateway) -> None:
    key = await new_key(gateway, "ordered")
    worker = gateway.workers[0]
    worker.is_held = True
    async with asyncio.TaskGroup() as group:
        for place in range(2):
            group.create_task(ask(gateway, key, prompt=[100 + place] * 3))
        await until(lambda: len(worker.submits) == 2, "the worker is full")
        for place, priority in enumerate([5, 5, -1, 0, None]):
            group.create_task(ask(gateway, key, prompt=[200 + place] * 3, priority=priority))
            await until_queued(gateway, (place + 1).__eq__)
        worker.is_held = False
    # -1 first, then 0 and none given (which is 0) as they came, then the two of 5 as they came.
    assert [submit.prompt_tokens[0] for submit in worker.submits[2:]] == [202, 203, 204, 200, 201]


@pytest.mark.parametrize(
    ("header", "stream"),
    [("x-stainless-read-timeout", False), ("x-request-timeout", False), ("x-request-timeout", True)],
)
async def test_queued_work_nobody_waits_for_is_dropped(gateway: Gateway, header: str, stream: bool) -> None:
    tenant = f"late-{header}-{stream}".lower()
    key = await new_key(gateway, tenant)
    worker = gateway.workers[0]
    worker.is_held = True
    async with asyncio.TaskGroup() as group:
        ahead = [group.create_task(ask(gateway, key)) for _ in range(2)]
        await until(lambda: len(worker.submits) == 2, "the worker is full")
        began = time.monotonic()
        late = await ask(gateway, key, {header: "0.3"}, stream=stream)
        waited_s = time.monotonic() - began
        worker.is_held = False
    assert 0.3 <= waited_s < 5
    if stream:
        # Its status was sent with the first keep-alive or not at all; either way the error is the last word.
        assert "deadline_exceeded" in late.text
    else:
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert late.headers["x-should-retry"] == "false"
    assert '"length"' not in late.text
    assert len(worker.submits) == 2, "it reached a worker although nobody waited"
    assert [answer.result().json()["choices"][0]["finish_reason"] for answer in ahead] == ["length"] * 2
    record = (await gateway.http.get(f"/api/requests/{late.headers['x-request-id']}", headers=ADMIN)).json()
    assert (record["status"], record["finish_reasons"]) == ("failed", [None])
    assert await metric(gateway, "vllm:admission_rejections_total", model_name=MODEL, reason="deadline") == 1
    row = (await gateway.http.get("/api/admin/usage", params={"tenant": tenant}, headers=ADMIN)).json()[
        "usage"
    ][0]
    assert row["completion_tokens"] <= 16  # those of the two ahead, and none of the dropped one


async def test_a_client_that_leaves_the_queue_costs_no_worker(gateway: Gateway) -> None:
    key = await new_key(gateway, "leaving")
    worker = gateway.workers[0]
    worker.is_held = True
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(ask(gateway, key))
        await until(lambda: len(worker.submits) == 2, "the worker is full")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await ask(gateway, key)
        await until_queued(gateway, (0).__eq__)
        worker.is_held = False
    assert len(worker.submits) == 2


ENDPOINTS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": "a text"}),
    ("completions", {"prompt": ["a text", "and another"], "n": 2}),
    ("chat/completions", {"messages": [{"role": "user", "content": "a text"}]}),
    ("responses", {"input": "a text"}),
]


@pytest.mark.parametrize(("endpoint", "body"), ENDPOINTS)
async def test_who_is_refused_whatever_its_prompt_is_refused_before_it_is_made_tokens(
    served: ServedModel,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    body: dict[str, Any],
) -> None:
    texts: list[str] = []
    tokenise = ServedModel.tokenise

    async def noted(self: ServedModel, text: str, param: str, mark: str | None = None) -> list[int]:
        texts.append(text)
        return await tokenise(self, text, param, mark)

    monkeypatch.setattr(ServedModel, "tokenise", noted)
    log = tmp_path / "requests.jsonl"
    settings: dict[str, Any] = {"redis_url": redis_server.url, "request_log": log, "max_queued_per_tenant": 1}
    worker = EchoWorker("both-0", "both", step_s=0.002)
    async with serving(served, [worker], max_sequences_per_worker=2, **settings) as gateway:

        async def post() -> httpx.Response:
            return await gateway.http.post(f"/v1/{endpoint}", json={"model": MODEL, **body})

        worker.is_held = True
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(ask(gateway, "none", prompt=[100 + number] * 3))
            await until(lambda: len(worker.submits) == 2, "the worker is full")
            await until_queued(gateway, (1).__eq__)
            refused = await post()
            seen = list(texts)
            worker.is_held = False
        assert refused.status_code == 429
        assert int(refused.headers["retry-after-ms"]) > 0
        assert seen == []
        assert (await post()).status_code == 200
        assert texts, "with room its prompt is read"
    (row,) = [row for row in map(json.loads, log.read_text().splitlines()) if row["status"] == "failed"]
    assert (row["request_id"], row["model"]) == (refused.headers["x-request-id"], MODEL)
