"""`cloudmatrix up`: the whole service on this machine, from nothing to ready, in the foreground until stopped.

    lock the data folder -> bind the ports -> fetch the model -> compile the kernels -> Redis
    -> workers, gateway, console -> wait until /readyz says 200 -> print how to call it
    -> keep everything alive -> stop everything

The ports are bound here and handed down, so a taken port is an error before anything was started, and a restarted
gateway comes back on the same socket without refusing a connection in between.
"""

import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from app.matrix.data_folder import DataFolder
from app.matrix.local import LocalLauncher, ProcessSpec
from app.matrix.solo import compile_kernels, worker_arguments
from app.models import catalogue
from app.models.entry import ModelEntry
from engine.protocol import Role
from memory_pool.redis_server import start_redis

READY_TIMEOUT_S = 120.0
MAX_DISK_BYTES = 8 << 30
"""Of the disk tier, when nobody says."""
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


class UpError(Exception):
    """The service could not be brought up; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What `cloudmatrix up` was asked for; a port of 0 means any free one, a console port of None no console."""

    prefill: int
    decode: int
    both: int
    model: str
    redis_url: str | None
    host: str
    port: int
    console_port: int | None
    data_dir: Path
    threads: int
    kv_memory_bytes: int
    pool_memory_bytes: int
    pool_disk_bytes: int | None = None
    """Capacity of the pool's disk tier; 0: none; None: as much as the disk can spare, at most 8 GiB."""
    autoscale: bool = False
    drain_s: float = 30.0
    """How long requests that were taken in may go on once the service is told to stop."""
    gateways: int = 1
    """Processes behind the one gateway port."""
    observe: Mapping[str, str] = field(default_factory=dict)
    """Variables of all processes that say what is traced and logged, and how."""
    gateway_redis_url: str | None = None
    """`redis_url` for a user who may do no more than gateways need."""
    request_log: Path | None = None
    """Each further gateway's has its number in the name."""


def run(options: UpOptions) -> None:
    """Bring the service up and keep it until SIGINT or SIGTERM. Raises UpError, and what fetching a model raises."""
    if options.prefill + options.both < 1 or options.decode + options.both < 1:
        raise UpError(
            "nothing could serve: give --prefill and --decode at least 1 each, or --both at least 1"
        )
    if options.gateway_redis_url is not None and options.redis_url is None:
        raise UpError("--gateway-redis names the Redis of --redis for another user: give --redis, too")
    with contextlib.ExitStack() as held:
        folder = held.enter_context(DataFolder(options.data_dir))
        gateway_socket = held.enter_context(_bind(options.host, options.port, "--port"))
        console_socket = None
        if options.console_port is not None:
            console_socket = held.enter_context(_bind(options.host, options.console_port, "--console-port"))
        entry = catalogue.pull(options.model)
        compile_kernels()
        redis_url = options.redis_url
        if redis_url is None:
            server = start_redis(folder.path / "redis", maxmemory_bytes=options.pool_memory_bytes)
            held.callback(server.stop)
            redis_url = server.url
        asyncio.run(_Service(options, folder, entry, redis_url, gateway_socket, console_socket).serve())


class _Service:
    """The processes of one `up`, from their start to their end."""

    def __init__(
        self,
        options: UpOptions,
        folder: DataFolder,
        entry: ModelEntry,
        redis_url: str,
        gateway_socket: socket.socket,
        console_socket: socket.socket | None,
    ) -> None:
        self._options = options
        self._folder = folder
        self._entry = entry
        self._gateway_socket = gateway_socket
        self._console_socket = console_socket
        self._out = Console(stderr=True, highlight=False, soft_wrap=True)
        # Secrets travel in the environment, which other users cannot read, and never in an argument list.
        self._environment = {"CLOUDMATRIX_REDIS_URL": redis_url, "CLOUDMATRIX_DATA_DIR": str(folder.path)}
        self._environment.update(options.observe)
        self._disk_folder = folder.path / "kv"
        self._disk_bytes = disk_capacity(options.pool_disk_bytes, self._disk_folder)
        if self._disk_bytes:
            self._environment["CLOUDMATRIX_POOL_DISK"] = str(self._disk_folder)

    async def serve(self) -> None:
        began = time.monotonic()
        stop = _stop_on_signals()
        launcher = LocalLauncher(
            on_event=lambda line: self._out.print(line, style="yellow"),
            on_restart=lambda: self._folder.write_service(self._urls(), launcher.pids()),
        )
        try:
            for spec in self._specs():
                launcher.start(spec)
            with self._out.status("Starting the workers and the gateway …"):
                await _first_of(self._until_ready(launcher), launcher.wait_failed(), stop.wait())
            if not stop.is_set():
                self._greet(time.monotonic() - began)
                await _first_of(launcher.wait_failed(), stop.wait())
        finally:
            await self._stop(launcher, stop)

    async def _stop(self, launcher: LocalLauncher, again: asyncio.Event) -> None:
        """Answer what was taken in, then stop; at once when asked `again`."""
        self._out.print("Stopping … (what was taken in is answered first; Ctrl-C again ends it now)")
        again.clear()
        # Ours are copies of the gateway's and console's: while they are open, new clients would wait for nobody.
        self._gateway_socket.close()
        if self._console_socket is not None:
            self._console_socket.close()
        stopped = asyncio.create_task(launcher.stop_all())
        hurried = asyncio.create_task(again.wait())
        await asyncio.wait((stopped, hurried), return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            launcher.kill_all()
        hurried.cancel()
        await stopped

    def _specs(self) -> Iterator[ProcessSpec]:
        counts: dict[Role, int] = {
            "prefill": self._options.prefill,
            "decode": self._options.decode,
            "both": self._options.both,
        }
        for role, count in counts.items():
            for index in range(count):
                yield self._worker(role, index)
        yield self._keeper()
        for number in range(self._options.gateways):
            yield self._gateway(number)
        if self._console_socket is not None:
            yield self._web("console", "app.console.serve", self._console_socket)

    def _worker(self, role: Role, index: int) -> ProcessSpec:
        options = self._options
        argv = worker_arguments(
            role, index, self._entry, threads=options.threads, kv_memory_bytes=options.kv_memory_bytes
        )
        name = f"{role}-{index}"
        log_path = self._folder.logs / f"{name}.log"
        return ProcessSpec(
            name=name,
            argv=[*argv, "--exit-with-parent"],
            env=self._environment,
            log_path=log_path,
            stop_grace_s=25,
        )

    def _keeper(self) -> ProcessSpec:
        argv = [sys.executable, "-m", "memory_pool.keeper"]
        if self._disk_bytes:
            argv += ["--disk-folder", str(self._disk_folder), "--disk-bytes", str(self._disk_bytes)]
        log_path = self._folder.logs / "keeper.log"
        return ProcessSpec(name="keeper", argv=argv, env=self._environment, log_path=log_path, is_vital=False)

    def _gateway(self, number: int) -> ProcessSpec:
        env = {}
        if self._options.gateway_redis_url is not None:
            env["CLOUDMATRIX_REDIS_URL"] = self._options.gateway_redis_url
        if self._options.autoscale and number == 0:
            env["CLOUDMATRIX_AUTOSCALE"] = "1"
        path = self._options.request_log
        if path is not None:
            env["CLOUDMATRIX_REQUEST_LOG"] = str(path.with_stem(f"{path.stem}-{number}") if number else path)
        name = f"gateway-{number}" if number else "gateway"
        return self._web(name, "app.serve", self._gateway_socket, env)

    def _web(
        self, name: str, module: str, listening: socket.socket, more: Mapping[str, str] | None = None
    ) -> ProcessSpec:
        env = {
            **self._environment,
            **(more or {}),
            "CLOUDMATRIX_LISTEN_FD": str(listening.fileno()),
            "CLOUDMATRIX_HOST": self._options.host,
            "CLOUDMATRIX_MODEL": self._entry.id,
            "CLOUDMATRIX_GATEWAY_URL": _url(self._gateway_socket),
            "CLOUDMATRIX_DRAIN_S": str(self._options.drain_s),
        }
        argv = [sys.executable, "-m", module]
        log_path = self._folder.logs / f"{name}.log"
        return ProcessSpec(
            name=name,
            argv=argv,
            env=env,
            log_path=log_path,
            pass_fds=(listening.fileno(),),
            stop_grace_s=self._options.drain_s + 5,
            is_door=True,
        )

    async def _until_ready(self, launcher: LocalLauncher) -> None:
        """Poll /readyz. Raises UpError with the last reason when it takes too long."""
        reason = "the gateway does not answer yet"
        deadline = time.monotonic() + READY_TIMEOUT_S
        async with httpx.AsyncClient(
            base_url=_url(self._gateway_socket), timeout=5, trust_env=False
        ) as client:
            while time.monotonic() < deadline:
                # Noted again and again, so that a kill at any moment leaves a true list of processes.
                self._folder.write_service(self._urls(), launcher.pids())
                with contextlib.suppress(httpx.HTTPError):
                    answer = await client.get("/readyz")
                    if answer.status_code == httpx.codes.OK:
                        return
                    reason = answer.text
                await asyncio.sleep(0.1)
        raise UpError(f"not ready after {READY_TIMEOUT_S:.0f} s: {reason}. Logs: {self._folder.logs}")

    def _urls(self) -> dict[str, str]:
        urls = {"url": _url(self._gateway_socket)}
        if self._console_socket is not None:
            urls["console_url"] = _url(self._console_socket)
        return urls

    def _greet(self, took_s: float) -> None:
        options = self._options
        workers = [
            f"{count} {role}"
            for role, count in (
                ("prefill", options.prefill),
                ("decode", options.decode),
                ("both", options.both),
            )
            if count
        ]
        base_url = _url(self._gateway_socket)
        body = json.dumps({"model": self._entry.id, **QUESTION})
        self._out.print(f"\n[bold green]cloudmatrix is ready[/] after {took_s:.1f} s. Ctrl-C stops it.")
        self._out.print(f"  API      {base_url}/v1   model {self._entry.id}, workers: {', '.join(workers)}")
        if self._console_socket is not None:
            self._out.print(f"  Console  {_url(self._console_socket)}")
        self._out.print(f"  Logs     {self._folder.logs}")
        self._out.print("\nTry it:")
        curl = f"  curl {base_url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
        self._out.print(curl + "\n", markup=False)


def disk_capacity(wanted_bytes: int | None, folder: Path) -> int:
    """Bytes that the disk tier in `folder` may take: what was asked for, else half of what it and the free space of its
    disk come to, at most 8 GiB."""
    if wanted_bytes is not None:
        return wanted_bytes
    held = sum(path.stat().st_size for path in folder.glob("*/??/*")) if folder.exists() else 0
    free = shutil.disk_usage(folder.parent).free
    return min(MAX_DISK_BYTES, (held + free) // 2)


def _bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket for a child to take over. Raises UpError when the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UpError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with {flag}"
        ) from error
    listening.listen(2048)
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _first_of(*jobs: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first to end, cancel the others, and raise what the first raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
