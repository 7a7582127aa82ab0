"""`cloudmatrix bench gateway`: what the gateway itself costs, with a worker that computes nothing.

Gateway and proxy run on one core each time, load client and echo on another; the sides alternate, and every figure is
the median over the repeats of one run.

added latency   p50 through the gateway - p50 of the same request on the worker's own link, one at a time
requests/s      whole answers of one token, closed loop
chunks/s        streamed text events that reach the clients, closed loop
"""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from websockets.asyncio.client import connect

from app.bench.client import Outcome, StreamingClient
from app.bench.load import percentiles
from app.bench.peers import machine
from engine.lifeline import PARENT_VARIABLE
from engine.protocol import (
    Cancel,
    Failed,
    Finished,
    Prefetch,
    SamplingParams,
    Submit,
    WorkerRecord,
    decode_from_worker,
    encode,
)
from memory_pool.directory import Directory
from memory_pool.redis_server import start_redis

MODEL = "smollm2-135m"
OURS, LITELLM = "cloudmatrix", "litellm"
START_TIMEOUT_S = 90.0
QUESTION = [{"role": "user", "content": "Why is the sky blue, and what would it take to make it green?"}]
Say = Callable[[str], None]
Send = Callable[[], Awaitable[Outcome]]


class GatewayBenchError(Exception):
    """A side that did not start or that failed; the message says which and what it said."""


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """How much to measure. `litellm`: an interpreter that has `litellm[proxy]`, None to leave it out."""

    litellm: Path | None = None
    repeat: int = 3
    requests: int = 600
    streams: int = 128
    stream_tokens: int = 128
    concurrency: int = 64
    latency_requests: int = 200


@dataclass(frozen=True)
class _Side:
    name: str
    url: str
    model: str
    direct: Callable[[int], Awaitable[list[float]]]
    """Seconds of so many one-token requests past the gateway, one after another."""


def run_gateway(options: GatewayOptions, say: Say) -> dict[str, Any]:
    """The whole measurement. Raises GatewayBenchError, and RedisServerError when there is no Redis."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gateway_core, client_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="cloudmatrix-gateway-")))
        if client_core is not None:
            os.sched_setaffinity(0, {client_core})
            held.callback(os.sched_setaffinity, 0, set(cores))
        sides = [held.enter_context(_own_side(folder, gateway_core))]
        if options.litellm is not None:
            sides.append(held.enter_context(_litellm_side(folder, options.litellm, gateway_core)))
        runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for number in range(options.repeat + 1):
            for side in sides:
                measured = asyncio.run(_measure(side, options, warm=number == 0))
                if number:  # the first warms up
                    runs[side.name].append(measured)
                    say(f"{number} of {options.repeat}: {side.name} " + ", ".join(_figures(measured)))
    medians = {name: _medians(of_side) for name, of_side in runs.items()}
    result: dict[str, Any] = {
        "machine": machine(),
        "pinned": gateway_core is not None,
        "options": {name: value for name, value in vars(options).items() if name != "litellm"},
        "sides": {name: {**medians[name], "runs": of_side} for name, of_side in runs.items()},
        "ratio": None,
    }
    if LITELLM in medians:
        result["ratio"] = {
            name: medians[OURS][name] / medians[LITELLM][name] for name in ("requests_per_s", "chunks_per_s")
        }
    return result


def _figures(result: Mapping[str, float]) -> Iterator[str]:
    yield f"{result['requests_per_s']:.0f} requests/s"
    yield f"{result['chunks_per_s']:.0f} chunks/s"
    yield f"+{result['added_latency_s'] * 1000:.2f} ms"


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


async def _measure(side: _Side, options: GatewayOptions, *, warm: bool) -> dict[str, float]:
    client = StreamingClient(side.url, api_key="sk-none", timeout_s=120)
    one = _body(side.model, max_tokens=1, stream=False)
    many = _body(side.model, max_tokens=options.stream_tokens, stream=True)
    few = 10 if warm else 1  # a tenth of everything, to warm up
    direct_s = await side.direct(options.latency_requests // few)
    alone = await _closed_loop(
        lambda: client.ask("/chat/completions", one), options.latency_requests // few, 1
    )
    began = time.perf_counter()
    await _closed_loop(
        lambda: client.ask("/chat/completions", one), options.requests // few, options.concurrency
    )
    requests_s = time.perf_counter() - began
    began = time.perf_counter()
    streamed = await _closed_loop(
        lambda: client.stream("/chat/completions", many), options.streams // few, options.concurrency
    )
    streams_s = time.perf_counter() - began
    through_s = percentiles([outcome.e2e_s for outcome in alone])["p50"]
    past_s = percentiles(direct_s)["p50"]
    assert through_s is not None
    assert past_s is not None
    return {
        "latency_s": through_s,
        "direct_latency_s": past_s,
        "added_latency_s": through_s - past_s,
        "requests_per_s": options.requests // few / requests_s,
        "chunks_per_s": sum(len(outcome.gaps_s) + 1 for outcome in streamed) / streams_s,
    }


async def _closed_loop(send: Send, num: int, concurrency: int) -> list[Outcome]:
    outcomes: list[Outcome] = []

    async def one_after_another() -> None:
        while len(outcomes) + len(under_way) < num:
            under_way.append(None)
            outcome = await send()
            under_way.pop()
            outcomes.append(outcome)

    under_way: list[None] = []
    async with asyncio.TaskGroup() as group:
        for _ in range(min(num, concurrency)):
            group.create_task(one_after_another())
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        raise GatewayBenchError(f"{len(failed)} of {num} requests failed, the first with: {failed[0]}")
    return outcomes


def _body(model: str, *, max_tokens: int, stream: bool) -> bytes:
    return msgspec.json.encode(
        {"model": model, "messages": QUESTION, "max_tokens": max_tokens, "stream": stream, "temperature": 0}
    )


@contextlib.contextmanager
def _own_side(folder: Path, core: int | None) -> Iterator[_Side]:
    """Redis, an echo worker and our gateway."""
    redis = start_redis(folder / "redis", maxmemory_bytes=1 << 28)
    with contextlib.ExitStack() as held:
        held.callback(redis.stop)
        environment = {"CLOUDMATRIX_REDIS_URL": redis.url, "CLOUDMATRIX_DATA_DIR": str(folder)}
        worker = [sys.executable, "-m", "app.bench.echo_worker", "--model", MODEL]
        held.enter_context(_process("echo worker", worker, folder, environment, None))
        port = _free_port()
        environment |= {"CLOUDMATRIX_PORT": str(port), "CLOUDMATRIX_MODEL": MODEL}
        gateway = [sys.executable, "-m", "app.serve"]
        process = held.enter_context(_process(OURS, gateway, folder, environment, core))
        url = f"http://127.0.0.1:{port}"
        _until(lambda: _answers(url + "/readyz"), OURS, process, folder)
        record = next(iter(Directory(redis.url).members().values()))
        link = msgspec.msgpack.decode(record, type=WorkerRecord).url.replace("http", "ws", 1) + "/link"
        yield _Side(OURS, url, MODEL, lambda num: _over_the_link(link, num))


@contextlib.contextmanager
def _litellm_side(folder: Path, python: Path, core: int | None) -> Iterator[_Side]:
    """LiteLLM's proxy, set to do as little as it can, before an upstream that costs next to nothing."""
    with contextlib.ExitStack() as held:
        upstream_port, port = _free_port(), _free_port()
        upstream = f"http://127.0.0.1:{upstream_port}"
        echo = [sys.executable, "-m", "app.bench.echo_upstream", str(upstream_port)]
        held.enter_context(_process("echo upstream", echo, folder, {}, None))
        config = folder / "litellm.yaml"
        parameters = {"model": "openai/echo", "api_base": upstream + "/v1", "api_key": "sk-none"}
        config.write_text(
            json.dumps(  # JSON is YAML, too
                {
                    "model_list": [{"model_name": "echo", "litellm_params": parameters}],
                    "litellm_settings": {"telemetry": False, "set_verbose": False},
                    "general_settings": {"disable_spend_logs": True},
                }
            ),
            encoding="utf-8",
        )
        command = python.parent / "litellm"
        argv = [
            str(python),
            str(command),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        environment = {
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no key check, as on our side
        }
        process = held.enter_context(
            _process(LITELLM, [*argv, "--num_workers", "1"], folder, environment, core)
        )
        url = f"http://127.0.0.1:{port}"
        _until(lambda: _answers(url + "/health/liveliness"), LITELLM, process, folder)
        direct = StreamingClient(upstream, api_key=None, timeout_s=30)
        body = _body("echo", max_tokens=1, stream=False)

        async def past_it(num: int) -> list[float]:
            return [
                o.e2e_s for o in await _closed_loop(lambda: direct.ask("/chat/completions", body), num, 1)
            ]

        yield _Side(LITELLM, url, "echo", past_it)


async def _over_the_link(url: str, num: int) -> list[float]:
    """Seconds of one-token requests on the worker's own link: what there is without a gateway."""
    seconds: list[float] = []
    async with connect(url, compression=None, max_size=None, proxy=None) as link:
        for number in range(num):
            request_id = f"direct-{number}"
            sampling = SamplingParams(max_tokens=1, seed=0)
            submit = Submit(request_id=request_id, phase="both", prompt_tokens=[1] * 40, sampling=sampling)
            messages: list[Submit | Cancel | Prefetch] = [submit]
            began = time.perf_counter()
            await link.send(encode(messages))
            over = False
            while not over:
                data = await link.recv(decode=False)
                events = decode_from_worker(bytes(data) if isinstance(data, bytes) else b"")
                over = any(isinstance(event, Finished | Failed) for event in events)
            seconds.append(time.perf_counter() - began)
    return seconds


@contextlib.contextmanager
def _process(
    name: str, argv: list[str], folder: Path, environment: Mapping[str, str], core: int | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on `core` that ends with the block; its log is `name` in `folder`."""
    if core is not None:
        argv = [sys.executable, "-c", _ON_CORE, str(core), *argv]
    with _log_path(folder, name).open("wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_ON_CORE = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"


def _log_path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-')}.log"


def _until(ready: Callable[[], bool], name: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            return
        time.sleep(0.1)
    said = _log_path(folder, name).read_text(errors="replace")[-1000:]
    raise GatewayBenchError(f"{name} did not start: {said}")


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
