"""Two gateway processes over one Redis and the same workers: what they share, and what all processes tell of it."""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from memory_pool.redis_server import start_redis
from tests.service.running import Service, running

MODEL = "smollm2-135m"
SECRET_WORDS = "the heron hid nine copper kettles under the chapel floor"
"""Stands in prompts, and must stand nowhere else."""


@dataclass
class Seen:
    """A span as the collector got it, with the process that sent it."""

    name: str
    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, str]
    starts_ns: int
    ends_ns: int
    trace_state: str


@dataclass
class Collector:
    """An OTLP collector that keeps what it gets."""

    url: str
    spans: list[Seen] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            about = {a.key: a.value.string_value for a in group.resource.attributes}
            for span in (span for scope in group.scope_spans for span in scope.spans):
                self.spans.append(
                    Seen(
                        span.name,
                        about["service.name"],
                        about["service.instance.id"],
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        {a.key: a.value.string_value or str(a.value.int_value) for a in span.attributes},
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        span.trace_state,
                    )
                )


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Pair:
    """Two gateways by their URLs, and what they and the workers leave behind."""

    first: str
    second: str
    service: Service
    collector: Collector
    folder: Path

    def logged(self) -> str:
        """Everything that any process wrote to a log."""
        return "\n".join(
            p.read_text() for p in [*(self.folder / "data/logs").iterdir(), self.folder / "second.log"]
        )


def until(found: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextlib.contextmanager
def second_gateway(folder: Path, redis_url: str) -> Iterator[str]:
    """One more gateway of the service in `folder`, on a socket of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening, (folder / "second.log").open("wb") as log:
        env = {
            **os.environ,
            "CLOUDMATRIX_REDIS_URL": redis_url,
            "CLOUDMATRIX_DATA_DIR": str(folder / "data"),
            "CLOUDMATRIX_LISTEN_FD": str(listening.fileno()),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "app.serve"],
            env=env,
            stdout=log,
            stderr=log,
            pass_fds=(listening.fileno(),),
        )
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
                until(lambda: client.get("/readyz").status_code == 200, "the second gateway is not ready")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with contextlib.ExitStack() as held:
        collector = held.enter_context(collecting())
        variables = pytest.MonkeyPatch()
        held.callback(variables.undo)
        variables.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        variables.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        variables.setenv("CLOUDMATRIX_OTEL", "otlp")
        variables.setenv("CLOUDMATRIX_LOG_FORMAT", "json")
        variables.setenv("CLOUDMATRIX_REQUEST_LOG", str(folder / "requests.jsonl"))
        redis = start_redis(folder / "redis", maxmemory_bytes=256 << 20)
        held.callback(redis.stop)
        service = held.enter_context(
            running(folder / "data", "--prefill", "2", "--decode", "2", "--no-console", "--redis", redis.url)
        )
        variables.setenv("CLOUDMATRIX_REQUEST_LOG", str(folder / "requests-1.jsonl"))
        second = held.enter_context(second_gateway(folder, redis.url))
        yield Pair(service.url, second, service, collector, folder)


def asked(**more: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": SECRET_WORDS, "max_tokens": 2, "ignore_eos": True, **more}


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=90, trust_env=False)


def gauge(url: str, name: str) -> float:
    text = httpx.get(url + "/metrics", trust_env=False).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return sum(sample.value for sample in samples)


def test_one_trace_over_gateway_prefill_pool_and_decode(pair: Pair) -> None:
    trace_id, parent = secrets.token_hex(16), secrets.token_hex(8)
    headers = {"traceparent": f"00-{trace_id}-{parent}-01", "tracestate": "vendor=one,other=two"}
    answer = httpx.post(pair.first + "/v1/completions", json=asked(), headers=headers, timeout=60)
    assert answer.status_code == 200
    # A request, its lookup and queue, two routed stays with a handoff between them, and what either worker did.
    expected = {"request", "pool.lookup", "queue", "route", "prefill", "handoff", "decode"}
    expected |= {"worker.prefill", "prefill.compute", "pool.publish", "worker.decode", "pool.fetch"}

    def spans() -> list[Seen]:
        return [span for span in pair.collector.spans if span.trace_id == trace_id]

    until(lambda: expected <= {span.name for span in spans()}, "spans are missing")
    by_id = {span.span_id: span for span in spans()}
    request = next(span for span in spans() if span.name == "request")
    assert request.parent_id == parent
    assert request.attributes["cloudmatrix.request_id"] == answer.headers["x-request-id"]
    assert request.attributes["gen_ai.usage.output_tokens"] == "2"
    assert request.attributes["gen_ai.request.max_tokens"] == "2"
    assert {span.trace_state for span in spans()} == {"vendor=one,other=two"}
    # On one span alone: who sums over a trace's spans counts what was used once.
    telling = [s.name for s in spans() if any(name.startswith("gen_ai.usage") for name in s.attributes)]
    assert telling == ["request"]

    def above(name: str, service: str) -> list[str]:
        """Names from the span upwards."""
        span = next(s for s in spans() if s.name == name and s.service == service)
        names = [span.name]
        while span.parent_id in by_id:
            span = by_id[span.parent_id]
            names.append(span.name)
        return names

    worker, gateway = "cloudmatrix-worker", "cloudmatrix-gateway"
    assert above("prefill.compute", worker) == ["prefill.compute", "worker.prefill", "prefill", "request"]
    assert above("pool.fetch", worker) == ["pool.fetch", "worker.decode", "decode", "request"]
    assert above("handoff", gateway) == ["handoff", "request"]
    assert {s.instance for s in spans() if s.service == worker} == {"prefill-0", "decode-0"}
    assert all(span.starts_ns <= span.ends_ns for span in spans())
    # One machine, one wall clock: what a worker did lies within its stay, give or take a reading of two clocks.
    stay = next(span for span in spans() if span.name == "prefill")
    inner = next(span for span in spans() if span.name == "worker.prefill")
    assert stay.starts_ns - 5_000_000 <= inner.starts_ns <= inner.ends_ns <= stay.ends_ns + 5_000_000


def test_a_caller_who_records_nothing_is_obeyed(pair: Pair) -> None:
    unwanted, wanted = secrets.token_hex(16), secrets.token_hex(16)
    for trace_id, flags in ((unwanted, "00"), (wanted, "01")):
        headers = {"traceparent": f"00-{trace_id}-{'a' * 16}-{flags}"}
        assert httpx.post(pair.first + "/v1/completions", json=asked(), headers=headers).status_code == 200
    until(lambda: any(s.trace_id == wanted for s in pair.collector.spans), "the later trace did not come")
    assert not [span for span in pair.collector.spans if span.trace_id == unwanted]


async def test_load_is_counted_once_and_seen_by_the_other(pair: Pair) -> None:
    until(
        lambda: (
            gauge(pair.first, "cloudmatrix_other_gateways")
            == 1
            == gauge(pair.second, "cloudmatrix_other_gateways")
        ),
        "the gateways do not know each other",
    )
    async with client(pair.first) as first:
        streams = [
            asyncio.create_task(first.post("/v1/completions", json=asked(max_tokens=400))) for _ in range(3)
        ]

        async def numbers() -> tuple[float, ...]:
            names = ("cloudmatrix_sequences_released", "cloudmatrix_other_gateways_sequences")
            asked_for = [(url, name) for url in (pair.first, pair.second) for name in names]
            return tuple([await asyncio.to_thread(gauge, url, name) for url, name in asked_for])

        deadline = time.monotonic() + 20
        # Three at the first, of which the second knows; none at the second.
        while (seen := await numbers()) != (3, 0, 0, 3):
            assert time.monotonic() < deadline, seen
            await asyncio.sleep(0.02)
        for answer in await asyncio.gather(*streams):
            assert answer.status_code == 200
        while (seen := await numbers()) != (0, 0, 0, 0):
            assert time.monotonic() < deadline, seen
            await asyncio.sleep(0.02)


def known_to_each_other(pair: Pair) -> bool:
    name = "cloudmatrix_other_gateways"
    return gauge(pair.first, name) == 1 == gauge(pair.second, name)


async def route_of(http: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    record = await http.get(f"/api/requests/{answer.headers['x-request-id']}")
    route: dict[str, Any] = record.json()["route"]
    return route


async def test_what_one_prefilled_the_other_sends_to_the_same_worker(pair: Pair) -> None:
    until(lambda: known_to_each_other(pair), "the gateways do not know each other")
    async with client(pair.first) as first, client(pair.second) as second:
        topics = ("a lighthouse", "an orchard", "a glacier", "a bakery")
        prompts = [f"This is a long report on {topic}. " * 40 for topic in topics]
        known = [gauge(url, "cloudmatrix_local_blocks") for url in (pair.first, pair.second)]
        answers = await asyncio.gather(
            *(first.post("/v1/completions", json=asked(prompt=prompt)) for prompt in prompts)
        )
        workers = [(await route_of(first, answer))["prefill_worker"] for answer in answers]
        # What came together was spread: each prompt weighs on the worker that has it.
        assert sorted(workers) == ["prefill-0", "prefill-0", "prefill-1", "prefill-1"]
        learnt = gauge(pair.first, "cloudmatrix_local_blocks") - known[0]
        assert learnt > 30  # four prompts of some 320 tokens, 32 a block, of which all but the last are whole
        await asyncio.to_thread(
            until,
            lambda: gauge(pair.second, "cloudmatrix_local_blocks") - known[1] == learnt,
            "what the first prefilled is not known to the second",
        )
        for prompt, worker in zip(prompts, workers, strict=True):
            route = await route_of(second, await second.post("/v1/completions", json=asked(prompt=prompt)))
            local = {row["worker"]: row["scores"]["local"] for row in route["reason"]["prefill"]}
            assert local.pop(worker) > 0.9
            assert list(local.values()) == [0]
            assert route["prefill_worker"] == worker


async def test_the_other_avoids_the_worker_that_one_has_loaded(pair: Pair) -> None:
    name = "cloudmatrix_other_gateways_sequences"

    def is_idle() -> bool:
        workers = httpx.get(pair.second + "/api/workers", trust_env=False).json()["workers"]
        return all(worker["running"] == worker["waiting"] == 0 for worker in workers)

    await asyncio.to_thread(until, is_idle, "workers announce what has ended")
    endless = asked(max_tokens=1500, stream=True)
    async with (
        client(pair.first) as first,
        client(pair.second) as second,
        first.stream("POST", "/v1/completions", json=endless) as busy,
    ):
        lines = busy.aiter_lines()
        await anext(lines)
        loaded = (await route_of(first, busy))["decode_worker"]
        await asyncio.to_thread(until, lambda: gauge(pair.second, name) == 1, "the load is not known")
        # What is known first may be the sequence's stay at its prefill worker.
        deadline = time.monotonic() + 10
        while True:
            route = await route_of(second, await second.post("/v1/completions", json=asked()))
            batch = {row["worker"]: row["scores"]["batch"] for row in route["reason"]["decode"]}
            if batch[loaded] < 1 or time.monotonic() > deadline:
                break
        assert batch.pop(loaded) == round(16 / 17, 6)  # 16 / (16 + sequences there)
        assert list(batch.values()) == [1]
        assert route["decode_worker"] != loaded
        await lines.aclose()


async def admin(http: httpx.AsyncClient, path: str, **body: object) -> dict[str, str]:
    answer = await http.post(f"/api/admin/{path}", json=body)
    assert answer.is_success, answer.text
    made: dict[str, str] = answer.json()
    return made


async def test_limits_and_keys_are_one_for_both(pair: Pair) -> None:
    """The last one that makes keys: from its first on, every call needs one."""
    async with client(pair.first) as first, client(pair.second) as second:
        await admin(first, "tenants", id="operators")
        await admin(first, "tenants", id="shared")
        await admin(first, "limits", subject_kind="tenant", subject_id="shared", requests_per_minute=10)
        operator = await admin(first, "keys", tenant_id="operators", name="operator", is_admin=True)
        first.headers["authorization"] = second.headers["authorization"] = f"Bearer {operator['key']}"
        theirs = await admin(first, "keys", tenant_id="shared", name="theirs")
        headers = {"authorization": f"Bearer {theirs['key']}"}

        async def ask(http: httpx.AsyncClient) -> int:
            return (await http.post("/v1/completions", json=asked(max_tokens=1), headers=headers)).status_code

        deadline = time.monotonic() + 2
        while (await second.get("/v1/models", headers={"authorization": ""})).status_code != 401:
            assert time.monotonic() < deadline, "the second gateway does not know that keys are needed now"
            await asyncio.sleep(0.02)
        # Ten in sixty seconds, whoever is asked: exactly ten of twenty.
        codes = await asyncio.gather(*(ask(http) for http in (first, second) for _ in range(10)))
        assert (codes.count(200), codes.count(429)) == (10, 10), codes
        usage = (await second.get("/api/admin/usage", params={"group_by": "tenant"})).json()["usage"]
        for _ in range(100):  # the ledger follows within a fraction of a second
            if [row["requests"] for row in usage if row["tenant"] == "shared"] == [10]:
                break
            await asyncio.sleep(0.05)
            usage = (await second.get("/api/admin/usage", params={"group_by": "tenant"})).json()["usage"]
        assert [row["requests"] for row in usage if row["tenant"] == "shared"] == [10]
        await admin(first, f"keys/{theirs['id']}/revoke")
        revoked_at = time.monotonic()
        while (await second.get("/v1/models", headers=headers)).status_code != 401:
            assert time.monotonic() < revoked_at + 1, "the revoked key still opens the second gateway"
            await asyncio.sleep(0.01)
    logged = pair.logged() + "".join(path.read_text() for path in pair.folder.glob("requests*.jsonl"))
    assert theirs["key"] not in logged
    assert operator["key"] not in logged


def test_logs_are_json_with_request_ids_and_hold_no_prompt(pair: Pair) -> None:
    lines = [json.loads(line) for line in pair.logged().splitlines() if line]
    ended = [line for line in lines if line["message"] == "request completed"]
    assert {line["process"] for line in ended} == {"gateway"}
    assert all(line["request_id"].startswith("req_") and line["prompt_tokens"] > 0 for line in ended)
    rows = [
        json.loads(line)
        for name in ("requests.jsonl", "requests-1.jsonl")
        for line in (pair.folder / name).read_text().splitlines()
    ]
    completed = {row["request_id"] for row in rows if row["status"] == "completed"}
    assert completed == {line["request_id"] for line in ended}
    everything = pair.logged() + json.dumps(rows) + str(pair.collector.spans)
    for words in (SECRET_WORDS, "heron", "kettles"):
        assert words not in everything
