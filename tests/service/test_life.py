"""How the service starts, stops, survives and refuses."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service.running import Service, launch, running


def gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there 20 seconds later."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    return alive


def test_ctrl_c_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    with running(tmp_path / "data") as service:
        family = service.family()
        assert len(family) >= 6  # supervisor, Redis, prefill, decode, gateway, console
    assert service.process.returncode == 0
    assert gone(family) == []
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_socket()]
    assert left == []
    assert not (tmp_path / "data" / "service.json").exists()


def test_a_killed_service_takes_its_processes_along_and_the_next_starts(tmp_path: Path) -> None:
    service = launch(tmp_path / "data")
    service.wait_ready()
    family = service.family()
    service.process.kill()
    service.process.wait()
    with running(tmp_path / "data") as again:
        assert gone(family) == []
        assert httpx.get(again.url + "/readyz", trust_env=False).status_code == 200


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        service = launch(tmp_path / "data", "--port", str(port))
        assert service.process.wait(timeout=60) != 0
    assert f"127.0.0.1:{port}" in service.output
    assert "--port" in service.output


def test_a_killed_worker_comes_back_and_requests_go_on(tmp_path: Path) -> None:
    body = {
        "model": "smollm2-135m",
        "prompt": "The river",
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
    }
    with running(tmp_path / "data", "--no-console") as service, service.client() as client:
        before = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        for worker in ("decode-0", "prefill-0"):
            os.kill(service.pid_of(worker), signal.SIGKILL)
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == before
            service.wait_ready()


def test_a_killed_gateway_comes_back_behind_the_same_port(tmp_path: Path) -> None:
    body = {"model": "smollm2-135m", "prompt": "The river", "max_tokens": 4, "temperature": 0}
    with running(tmp_path / "data", "--no-console") as service:
        with service.client() as client:
            before = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        killed = psutil.Process(service.pid_of("gateway"))
        killed.kill()
        killed.wait(10)
        deadline = time.monotonic() + 60
        # The port stays open: who calls meanwhile waits, or is told when to come back while workers are looked up.
        with service.client() as client:
            while (answer := client.post("/v1/completions", json=body)).status_code != 200:
                assert answer.status_code == 503, answer.text
                assert time.monotonic() < deadline
                time.sleep(int(answer.headers["retry-after-ms"]) / 1000)
        assert answer.json()["choices"][0]["text"] == before
        assert psutil.Process(service.pid_of("gateway")).is_running()
        assert service.pid_of("gateway") != killed.pid, "service.json names the process that is there"


async def test_sigterm_under_load_loses_no_reply(tmp_path: Path) -> None:
    """Streams that are decoding and requests still waiting for their prefill are answered to the end."""
    body = {"model": "smollm2-135m", "max_tokens": 96, "temperature": 0, "ignore_eos": True}
    # As long as it takes: a busy machine's half minute is too short for two dozen answers.
    with running(tmp_path / "data", "--no-console", "--drain-s", "200") as service:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=service.url, timeout=200, limits=limits, trust_env=False
        ) as client:
            began: asyncio.Queue[None] = asyncio.Queue()

            async def stream(index: int) -> bool:
                asked = {**body, "prompt": f"Chapter {index}", "stream": True}
                async with client.stream("POST", "/v1/completions", json=asked) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    began.put_nowait(None)
                    lines = [line async for line in answer.aiter_lines()]
                    return lines[-2] == "data: [DONE]" and any('"length"' in line for line in lines)

            async def whole(index: int) -> bool:
                answer = await client.post("/v1/completions", json={**body, "prompt": f"Page {index} " * 200})
                return bool(answer.json()["usage"]["completion_tokens"] == 96)

            replies = [asyncio.create_task(job(index)) for index in range(12) for job in (stream, whole)]
            for _ in range(12):
                await began.get()
            service.process.send_signal(signal.SIGTERM)
            assert await asyncio.gather(*replies) == [True] * 24
            with pytest.raises(httpx.TransportError):
                await client.get("/healthz")
        assert service.process.wait(timeout=60) == 0


async def test_200_streams_at_once_all_complete(service: Service) -> None:
    async with httpx.AsyncClient(
        base_url=service.url, timeout=240, limits=httpx.Limits(max_connections=300), trust_env=False
    ) as client:

        async def stream(index: int) -> tuple[int, bool, bool]:
            pieces, finished, done = 0, False, False
            body = {
                "model": "smollm2-135m",
                "prompt": f"Story number {index}:",
                "max_tokens": 16,
                "stream": True,
            }
            async with client.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    pieces += line.startswith("data: {")
                    finished |= '"finish_reason":"length"' in line.replace(" ", "")
                    done |= line == "data: [DONE]"
            return pieces, finished, done

        results = await asyncio.gather(*(stream(index) for index in range(200)))
    assert [r for r in results if not (r[0] and r[1] and r[2])] == []


def test_everything_is_freed_when_clients_vanish(service: Service) -> None:
    body = {
        "model": "smollm2-135m",
        "prompt": "Endless",
        "max_tokens": 1500,
        "stream": True,
        "ignore_eos": True,
    }
    with service.client() as client:
        for _ in range(4):
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
    with service.client() as client:
        for _ in range(400):
            workers = client.get("/api/workers").json()["workers"]
            if all(worker["running"] == worker["waiting"] == 0 for worker in workers):
                break
            time.sleep(0.05)
    assert [(w["running"], w["waiting"]) for w in workers] == [(0, 0)] * len(workers)


BAD = {
    "messages": {"model": "smollm2-135m", "messages": []},
    "max_tokens": {"model": "smollm2-135m", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1},
    "model": {"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]},
    "temperature": {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": "hot",
    },
    "tools": {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function"}],
    },
}


@pytest.mark.parametrize("field", BAD)
def test_bad_fields_are_named(service: Service, field: str) -> None:
    with service.client() as client:
        answer = client.post("/v1/chat/completions", json=BAD[field])
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert field in (error["param"] or "") or field in error["message"]


def test_a_prompt_of_100000_tokens_is_refused_quickly(service: Service) -> None:
    with service.client(timeout_s=20) as client:
        answer = client.post("/v1/completions", json={"model": "smollm2-135m", "prompt": "word " * 100_000})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"{", b'{"model": "\xff\xfe"}', b"[]", b"null"], ids=["cut", "utf8", "list", "null"]
)
def test_bodies_that_are_not_json_objects(service: Service, body: bytes) -> None:
    with service.client() as client:
        answer = client.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert client.get("/readyz").status_code == 200
