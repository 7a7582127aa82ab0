"""MatrixCompute on one machine: starts the service's processes, restarts those that die, stops them all.

    spec -> starting -> running -> exited --(restart after a growing pause)--> starting
                           |
                         stop() -> SIGTERM -> (grace over) SIGKILL -> gone

Every child runs in a session of its own, so Ctrl-C at the terminal reaches the supervisor alone, which ends the rest.
A child leaves by itself when the supervisor is gone, however that ended (`engine.lifeline`).
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.lifeline import PARENT_VARIABLE

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
HEALTHY_AFTER_S = 30.0
"""A process that lived this long starts over with the first pause when it dies."""
GIVE_UP_AFTER = 5
"""Early deaths in a row after which the service is stopped: it will not get better by itself."""


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process of the service: how to start it and where its output goes."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    pass_fds: tuple[int, ...] = ()
    stop_grace_s: float = 10.0
    is_vital: bool = True
    """Whether the service cannot do without it: it is stopped when this process keeps dying."""
    is_door: bool = False
    """Whether clients are connected to it: it goes first, while the others still serve what it has taken in."""


@dataclass
class _Child:
    spec: ProcessSpec
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[None] | None = None
    early_deaths: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


class ProcessFailedError(Exception):
    """A process kept dying; the message holds the end of its log."""


class LocalLauncher:
    """Keeps a set of processes alive. `on_event` gets one line for the terminal per restart; `on_restart` is called
    when a process has another id than before."""

    def __init__(
        self, on_event: Callable[[str], None], on_restart: Callable[[], None] = lambda: None
    ) -> None:
        self._on_event = on_event
        self._on_restart = on_restart
        self._children: dict[str, _Child] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, spec: ProcessSpec) -> None:
        """Begin to keep `spec` alive. Raises ValueError when the name is taken."""
        if spec.name in self._children:
            raise ValueError(f"process {spec.name!r} is already running")
        child = _Child(spec)
        self._children[spec.name] = child
        child.task = asyncio.create_task(self._keep_alive(child), name=f"keep-{spec.name}")

    async def wait_failed(self) -> None:
        """Return never, or raise ProcessFailedError once a process is beyond help."""
        await asyncio.shield(self._failed)

    def pids(self) -> dict[str, int]:
        """Process ids by name, of those alive now."""
        return {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process is not None and child.process.returncode is None
        }

    async def stop(self, name: str, *, at_once: bool = False) -> None:
        """Stop one process and forget it: SIGTERM, then SIGKILL when its grace is over."""
        child = self._children[name]
        child.stopping.set()
        process = child.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), child.spec.stop_grace_s)
            except TimeoutError:
                self._on_event(f"{name} did not stop within {child.spec.stop_grace_s:.0f} s: killed")
                process.kill()
                await process.wait()
        if child.task is not None:
            child.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await child.task
        del self._children[name]

    async def stop_all(self, *, at_once: bool = False) -> None:
        """Stop every process: the doors together, then all the others together."""
        doors = [name for name, child in self._children.items() if child.spec.is_door]
        await asyncio.gather(*(self.stop(name, at_once=at_once) for name in doors))
        await asyncio.gather(*(self.stop(name, at_once=at_once) for name in list(self._children)))

    def kill_all(self) -> None:
        """End every process now; a `stop_all` under way then has nothing left to wait for."""
        for child in self._children.values():
            if child.process is not None and child.process.returncode is None:
                child.process.kill()

    async def _keep_alive(self, child: _Child) -> None:
        spec, is_restart = child.spec, False
        while not child.stopping.is_set():
            began = time.monotonic()
            with spec.log_path.open("ab") as log:
                child.process = await asyncio.create_subprocess_exec(
                    *spec.argv,
                    env={**os.environ, PARENT_VARIABLE: str(os.getpid()), **spec.env},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=spec.pass_fds,
                )
            if is_restart:
                self._on_restart()
            is_restart = True
            code = await child.process.wait()
            if child.stopping.is_set():
                return
            lived_s = time.monotonic() - began
            child.early_deaths = 0 if lived_s >= HEALTHY_AFTER_S else child.early_deaths + 1
            ending = describe_exit(code)
            if child.early_deaths >= GIVE_UP_AFTER and spec.is_vital:
                if not self._failed.done():
                    tail = f"The end of {spec.log_path}:\n{log_tail(spec.log_path)}"
                    died = f"{spec.name} died {GIVE_UP_AFTER} times in a row; the last time it {ending}."
                    self._failed.set_exception(ProcessFailedError(f"{died} {tail}"))
                return
            pause_s = restart_pause_s(child.early_deaths)
            again = f"starting it again in {pause_s:.1f} s (log: {spec.log_path})"
            self._on_event(f"{spec.name} {ending} after {lived_s:.0f} s: {again}")
            await asyncio.sleep(pause_s)


def restart_pause_s(early_deaths: int) -> float:
    """Seconds to wait before the next start: doubling from 0.5 s up to 8 s."""
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(0, early_deaths - 1)))


def describe_exit(code: int) -> str:
    """An exit status in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def log_tail(path: Path, num_lines: int = 15) -> str:
    """The last lines of a log file, indented; a note when there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()[-num_lines:]
    except OSError as error:
        return f"  (no log: {error})"
    return "\n".join("  " + line for line in lines) or "  (empty)"
