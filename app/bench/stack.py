"""A service put together piece by piece, so that a measurement can start, kill and compare its parts."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from app.bench.served import START_TIMEOUT_S, STOP_TIMEOUT_S, ServedError
from app.matrix.solo import worker_arguments
from app.models.entry import ModelEntry
from engine.protocol import Role, WorkerRecord
from memory_pool.directory import Directory

_KV_BYTES = 1 << 30
_POLL_S = 0.05


class Stack:
    """A gateway on `redis_url`, at `url`, and the workers it is given. Logs go to `folder`; `settings`: the gateway's.

    Raises ServedError from every method when a process does not do what it should.
    """

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        entry: ModelEntry,
        *,
        threads: int,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._entry = entry
        self._threads = threads
        self._directory = Directory(redis_url)
        folder.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **os.environ,
            "CLOUDMATRIX_REDIS_URL": redis_url,
            "CLOUDMATRIX_DATA_DIR": str(folder),
            "CLOUDMATRIX_MODEL": entry.id,
            **(settings or {}),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            os.set_inheritable(listening.fileno(), True)
            self._environment["CLOUDMATRIX_LISTEN_FD"] = str(listening.fileno())
            self._start("gateway", [sys.executable, "-m", "app.serve"], pass_fds=(listening.fileno(),))
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._http.close()
        self._directory.close()

    def add_worker(self, role: Role, index: int = 0, *more: str) -> str:
        """Start a worker with `more` arguments and wait until it is ready; its name."""
        argv = worker_arguments(role, index, self._entry, threads=self._threads, kv_memory_bytes=_KV_BYTES)
        name = f"{role}-{index}"
        self._start(name, [*argv, "--exit-with-parent", *more])
        self._until(f"{name} is ready", lambda: self._state(name) == "ready")
        return name

    def kill_worker(self, name: str) -> None:
        """SIGKILL, and wait until it is forgotten."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        self._until(f"{name} is forgotten", lambda: self._state(name) is None)

    def wait_ready(self) -> None:
        """Until the gateway serves requests."""
        self._until("the gateway is ready", self._answers)

    def newest_record(self) -> dict[str, Any]:
        """The record of the request that came last, with the reports of its workers."""
        newest = self._http.get("/api/requests", params={"limit": 1}).json()["requests"][0]["request_id"]
        record: dict[str, Any] = self._http.get(f"/api/requests/{newest}").json()
        return record

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get("/readyz").status_code == httpx.codes.OK
        return False

    def _state(self, name: str) -> str | None:
        data = self._directory.members().get(name)
        return None if data is None else msgspec.msgpack.decode(data, type=WorkerRecord).state

    def _start(self, name: str, argv: list[str], pass_fds: tuple[int, ...] = ()) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=pass_fds,
            )

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    log = (self._folder / f"{name}.log").read_text(errors="replace")
                    raise ServedError(f"{name} ended: {log[-1000:]}")
            if time.monotonic() > deadline:
                raise ServedError(f"not within {START_TIMEOUT_S:.0f} s: {what}. Logs: {self._folder}")
            time.sleep(_POLL_S)
