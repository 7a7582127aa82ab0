"""A real worker behind a slow way to its pool: it computes what would take longer to fetch, and says the same."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.models.catalogue import pull
from memory_pool.redis_server import RedisServer, start_redis
from tests.engine.processes import WorkerProcess, request

BYTES_PER_S = 2e6
PROMPTS = [[1000 + 200 * number + i for i in range(170)] for number in range(5)]
"""Five blocks of 391,680 bytes each: 1.96 MB, a second of this way; computed in a fraction of it."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    started = start_redis(tmp_path / "redis", maxmemory_bytes=1 << 30)
    yield started
    started.stop()


@pytest.fixture
def slow_url(server: RedisServer, tmp_path: Path) -> Iterator[str]:
    """The same Redis over a way that brings few bytes a second."""
    direct, slow = tmp_path / "redis" / "redis.sock", tmp_path / "slow.sock"
    assert direct.exists()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(slow))
    listening.listen()

    def pump(source: socket.socket, sink: socket.socket, bytes_per_s: float) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                time.sleep(len(data) / bytes_per_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(direct))
                for ends in ((near, far, 1e12), (far, near, BYTES_PER_S)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield server.url.replace(str(direct), str(slow))
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


@pytest.mark.slow
def test_what_is_quicker_to_compute_is_computed(server: RedisServer, slow_url: str, tmp_path: Path) -> None:
    model = pull("smollm2-135m", progress=lambda *_: None).path
    with contextlib.ExitStack() as held:

        def start(name: str, url: str) -> WorkerProcess:
            worker = WorkerProcess(name, "both", model, url, tmp_path / f"{name}.log")
            held.callback(worker.end)
            return worker.wait_ready()

        near, far = start("near", server.url), start("far", slow_url)
        first, second = held.enter_context(near.link()), held.enter_context(far.link())
        reuses = []
        for number, prompt in enumerate(PROMPTS):
            name = f"r{number}"
            for link in (first, second):
                link.send(request(name, prompt, max_tokens=8))
                link.finish(name)
            assert second.tokens(name) == first.tokens(name)
            reuses.append(second.report(name).reuse)
            assert reuses[-1] is not None
            assert reuses[-1].found_blocks == 5
        chosen = [reuse.chosen_blocks for reuse in reuses if reuse is not None]
        # The first three are tried; then it is known that a second of fetching is worse than computing.
        assert chosen[:3] == [5, 5, 5]
        assert 0 in chosen[3:]
        left = 3 + chosen[3:].index(0)
        reuse = reuses[left]
        assert reuse is not None
        assert reuse.fetch_s is not None
        assert reuse.fetch_s > reuse.compute_s
        assert second.report(f"r{left}").computed_tokens == 170
