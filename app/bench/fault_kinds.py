"""What can go wrong with the pool of a running service, done to it for real, and undone."""

import contextlib
import json
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from app.bench.served import ServedError
from memory_pool.connection import Connection
from memory_pool.redis_store import BLOCK_PREFIX
from memory_pool.store import StoreError

_HEAL_TIMEOUT_S = 30.0
_POLL_S = 0.05
_LASTS_S = 2.0
"""How long a fault goes on that does not end by itself."""
_HANGS_S = 5.0
_EVERY_S = 0.05


@dataclass(slots=True)
class Injury:
    """The handles by which one service is hurt: its URL, its data folder, its Redis. Undoes everything at its end."""

    url: str
    folder: Path
    redis_url: str | None = None
    counted: int = 0
    """What the fault did: keys deleted, blocks damaged …"""
    before: dict[str, Any] = field(default_factory=dict)
    redis: Connection = field(init=False)
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.redis = Connection(self.redis_url or (self.folder / "redis" / "url").read_text())

    def __enter__(self) -> Self:
        self.before = self.pool()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self.redis.close()

    def undo(self, step: Callable[[], object]) -> None:
        """Have `step` done at the end, last first."""
        self._undo.callback(step)

    def pool(self) -> dict[str, Any]:
        """What the service says of its pool."""
        answer: dict[str, Any] = httpx.get(self.url + "/api/pool", trust_env=False, timeout=30).json()
        return answer

    def rise(self, *path: str) -> int:
        """By how much a number of the pool's statistics rose since the beginning."""
        now: Any = self.pool()
        then: Any = self.before
        for name in path:
            now, then = (now or {}).get(name), (then or {}).get(name)
        return int(now or 0) - int(then or 0)

    def info(self, section: str) -> dict[str, Any]:
        """A section of Redis's own figures."""
        figures: dict[str, Any] = self.redis.call("INFO", section)
        return figures

    def keeper(self) -> psutil.Process:
        """The service's keeper, as it is now. Raises StopIteration while there is none."""
        supervisor = psutil.Process(json.loads((self.folder / "service.json").read_text())["pid"])
        return next(child for child in supervisor.children() if "memory_pool.keeper" in child.cmdline())

    def blocks(self) -> list[bytes]:
        """The Redis keys of all blocks in DRAM."""
        return self.redis.scan(BLOCK_PREFIX + "*")

    def for_a_while(self, act: Callable[[random.Random], int]) -> None:
        """Call `act` again and again and add up what it did."""
        draw = random.Random(5)  # noqa: S311 - chance, not secrets
        until = time.monotonic() + _LASTS_S
        while time.monotonic() < until:
            self.counted += act(draw)
            time.sleep(_EVERY_S)

    def wait_healed(self) -> None:
        """Until the service says that its pool is available. Raises ServedError when that takes too long."""
        until = time.monotonic() + _HEAL_TIMEOUT_S
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                if self.pool()["available"]:
                    return
            time.sleep(_POLL_S)
        raise ServedError(f"the pool did not come back within {_HEAL_TIMEOUT_S:.0f} s")


@dataclass(frozen=True, slots=True)
class Fault:
    """`strike` hurts the service, `trace` says what it left there. Raises ServedError when it left nothing."""

    name: str
    strike: Callable[[Injury], None]
    left: Callable[[Injury], tuple[int, str]]

    def trace(self, injury: Injury) -> str:
        """What proves that the fault took place."""
        count, what = self.left(injury)
        if count <= 0:
            raise ServedError(f"{self.name}: left no trace ({what})")
        return what


def _kill_redis(injury: Injury) -> None:
    psutil.Process(int(injury.info("server")["process_id"])).kill()


def _restarted(injury: Injury) -> tuple[int, str]:
    until = time.monotonic() + _HEAL_TIMEOUT_S
    while time.monotonic() < until:
        with contextlib.suppress(StoreError):
            up_s = int(injury.info("server")["uptime_in_seconds"])
            blocks = injury.rise("namespaces", "default", "disk_hits")
            return min(
                60 - up_s, blocks
            ), f"Redis restarted {up_s} s before the end, {blocks} blocks came back from disk"
        time.sleep(_POLL_S)
    return 0, "Redis did not come back"


def _fill_redis(injury: Injury) -> None:
    limit = injury.redis.memory()[1]
    injury.undo(lambda: injury.redis.call("CONFIG", "SET", "maxmemory-policy", "volatile-lru"))
    injury.undo(lambda: injury.redis.call("CONFIG", "SET", "maxmemory", limit))
    injury.redis.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    injury.redis.call("CONFIG", "SET", "maxmemory", "1mb")


def _refused(injury: Injury) -> tuple[int, str]:
    count = int(injury.info("errorstats").get("errorstat_OOM", {"count": 0})["count"])
    return count, f"Redis refused {count} writes"


def _flip(injury: Injury) -> None:
    def act(draw: random.Random) -> int:
        keys = injury.blocks()
        for key in draw.sample(keys, len(keys) // 2):
            length = int(injury.redis.call("STRLEN", key))
            if length:
                at = draw.randrange(length)
                byte = injury.redis.call("GETRANGE", key, at, at)
                injury.redis.call("SETRANGE", key, at, bytes([byte[0] ^ 0x55]) if byte else b"\x55")
        return len(keys) // 2

    injury.for_a_while(act)


def _truncate(injury: Injury) -> None:
    def act(draw: random.Random) -> int:
        keys = injury.blocks()
        for key in draw.sample(keys, len(keys) // 2):
            half = injury.redis.call("GETRANGE", key, 0, draw.randrange(1, 300_000))
            injury.redis.call("SET", key, half, "XX", "KEEPTTL")
        return len(keys) // 2

    injury.for_a_while(act)


def _damaged(injury: Injury) -> tuple[int, str]:
    count = injury.rise("damaged")
    return count, f"{injury.counted} times hurt, {count} damaged blocks found and deleted"


def _delete(injury: Injury) -> None:
    def act(draw: random.Random) -> int:
        keys = injury.blocks()
        chosen = draw.sample(keys, len(keys) // 2)
        for key in chosen:
            injury.redis.call("DEL", key)
        return len(chosen)

    injury.for_a_while(act)


def _gone(injury: Injury) -> tuple[int, str]:
    return injury.counted, f"{injury.counted} blocks deleted"


def _hang_redis(injury: Injury) -> None:
    server = psutil.Process(int(injury.info("server")["process_id"]))
    injury.undo(server.resume)
    server.suspend()
    time.sleep(_HANGS_S)
    server.resume()
    injury.counted = 1


def _hung(injury: Injury) -> tuple[int, str]:
    return injury.counted, f"Redis stood still for {_HANGS_S:.0f} s"


def _forget_blocks(injury: Injury) -> None:
    """Empty both tiers, so that the keeper has something to write."""
    for key in injury.blocks():
        injury.redis.call("DEL", key)
    for path in (injury.folder / "kv").glob("*/??/*"):
        path.unlink(missing_ok=True)


def _fill_disk(injury: Injury) -> None:
    # No file of the keeper may grow: what a full disk says to a writer, without filling anybody's disk.
    keeper = injury.keeper()
    before = keeper.rlimit(resource.RLIMIT_FSIZE)
    injury.undo(lambda: keeper.rlimit(resource.RLIMIT_FSIZE, before))
    keeper.rlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    _forget_blocks(injury)


def _lock_disk(injury: Injury) -> None:
    folder = injury.folder / "kv"
    _forget_blocks(injury)
    if os.geteuid():
        for path in [folder, *(child for child in folder.rglob("*") if child.is_dir())]:
            injury.undo(partial(path.chmod, path.stat().st_mode))
            path.chmod(0o500)
        return
    # Rights do not bind the superuser; a mount does.
    for words in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        subprocess.run(["mount", *words], check=True, capture_output=True)
    injury.undo(lambda: subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True))


def _not_saved(injury: Injury) -> tuple[int, str]:
    until = time.monotonic() + _HEAL_TIMEOUT_S
    count = 0
    while time.monotonic() < until and not count:
        count = injury.rise("tiers", "disk", "failures")
        time.sleep(_POLL_S)
    return count, f"{count} writes to the disk tier failed"


def _kill_keeper(injury: Injury) -> None:
    keeper = injury.keeper()
    injury.counted = keeper.pid
    keeper.kill()


def _keeper_back(injury: Injury) -> tuple[int, str]:
    until = time.monotonic() + _HEAL_TIMEOUT_S
    while time.monotonic() < until:
        with contextlib.suppress(psutil.Error, StopIteration):
            if injury.keeper().pid != injury.counted:
                return 1, "the supervisor started another keeper"
        time.sleep(_POLL_S)
    return 0, "no other keeper came"


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("redis killed", _kill_redis, _restarted),
        Fault("redis full", _fill_redis, _refused),
        Fault("redis hangs", _hang_redis, _hung),
        Fault("bytes flipped", _flip, _damaged),
        Fault("truncated", _truncate, _damaged),
        Fault("keys deleted", _delete, _gone),
        Fault("disk full", _fill_disk, _not_saved),
        Fault("disk read-only", _lock_disk, _not_saved),
        Fault("keeper killed", _kill_keeper, _keeper_back),
    )
}
