"""A real `cloudmatrix up` in a process of its own, on free ports and in a folder of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

STOP_TIMEOUT_S = 100.0
"""Covers the gateway's time to finish, then the workers', on a busy machine."""
START_TIMEOUT_S = 240.0
"""Covers a first start, which fetches the model and compiles the kernels."""


class Service:
    """A service that was started; `url` is the gateway's base."""

    def __init__(self, process: subprocess.Popen[bytes], data_dir: Path, output: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        self._output = output

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def noted(self) -> dict[str, Any]:
        """What the service says of itself in its folder. Raises KeyError while that is still its predecessor's."""
        noted: dict[str, Any] = json.loads((self.data_dir / "service.json").read_text())
        if noted["pid"] != self.process.pid:
            raise KeyError("pid")
        return noted

    @property
    def url(self) -> str:
        return str(self.noted["url"])

    def client(self, timeout_s: float = 120) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)

    def pid_of(self, name: str) -> int:
        return next(int(p["pid"]) for p in self.noted["processes"] if p["name"] == name)

    def wait_ready(self) -> float:
        """Seconds until /readyz said 200."""
        began = time.monotonic()
        while time.monotonic() < began + START_TIMEOUT_S:
            assert self.process.poll() is None, f"the service ended: {self.output}"
            with contextlib.suppress(httpx.HTTPError, OSError, KeyError, ValueError):
                if httpx.get(self.url + "/readyz", trust_env=False).status_code == 200:
                    return time.monotonic() - began
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.output}")

    def family(self) -> list[psutil.Process]:
        """The supervisor and everything below it."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]


def launch(data_dir: Path, *args: str) -> Service:
    """`cloudmatrix up` with free ports, without waiting for it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    output = data_dir / "up.log"
    argv = [sys.executable, "-m", "app.cli", "up", "--data-dir", str(data_dir)]
    argv += ["--port", "0", "--console-port", "0", *args]
    with output.open("wb") as log:
        process = subprocess.Popen(
            argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(os.environ)
        )
    return Service(process, data_dir, output)


@contextlib.contextmanager
def running(data_dir: Path, *args: str) -> Iterator[Service]:
    """A service that is ready, stopped at the end as Ctrl-C would."""
    service = launch(data_dir, *args)
    try:
        service.wait_ready()
        yield service
    finally:
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGINT)
            try:
                service.process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait()
                raise
