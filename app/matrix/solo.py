"""One worker by itself, in this very process: what a container or another machine runs."""

import contextlib
import os
import socket
import subprocess
import sys
from typing import NoReturn

from app.matrix.placement import place
from app.models import catalogue
from app.models.entry import ModelEntry
from engine.protocol import Role
from memory_pool.model_cache import ModelCache


class KernelsError(Exception):
    """The kernels could not be compiled; the message says what to do."""


def worker_arguments(
    role: Role, index: int, entry: ModelEntry, *, threads: int, kv_memory_bytes: int
) -> list[str]:
    """The command line of the `index`-th worker of `role`. Raises ValueError when the supernode is full."""
    location = place(role, index)
    argv = [sys.executable, "-m", "engine.server", "--id", f"{role}-{index}", "--role", role]
    argv += ["--model", entry.id, "--model-path", str(entry.path)]
    argv += ["--location", f"{location.node}/{location.npu}/{location.die}"]
    return [*argv, "--threads", str(threads), "--kv-bytes", str(kv_memory_bytes)]


def compile_kernels() -> None:
    """Have the kernels compiled into the cache by a process of its own. Raises KernelsError."""
    finished = subprocess.run([sys.executable, "-m", "app.compile_kernels"], check=False)
    if finished.returncode:
        raise KernelsError(
            "the kernels could not be compiled (see above); is the cache folder writable? "
            "CLOUDMATRIX_CACHE_DIR names another one"
        )


def run_worker(
    role: Role,
    index: int,
    model: str,
    redis_url: str,
    host: str,
    threads: int,
    kv_memory_bytes: int,
    port: int = 0,
    model_cache_bytes: int = 0,
) -> NoReturn:
    """Fetch the model, compile the kernels and become the worker. `port` 0: any free one.

    With `model_cache_bytes` the model comes from the pool when it lies there, and is put there otherwise.
    """
    if model_cache_bytes:
        with contextlib.closing(ModelCache(redis_url, capacity_bytes=model_cache_bytes)) as pool:
            entry = catalogue.pull(model, pool=pool)
    else:
        entry = catalogue.pull(model)
    compile_kernels()
    address = socket.gethostbyname(socket.gethostname()) if host == "auto" else host
    argv = worker_arguments(role, index, entry, threads=threads, kv_memory_bytes=kv_memory_bytes)
    # In the environment rather than among the arguments: the URL may hold a password.
    os.environ["CLOUDMATRIX_REDIS_URL"] = redis_url
    os.execv(argv[0], [*argv, "--host", address, "--port", str(port)])  # noqa: S606 - becomes our own program, no shell
