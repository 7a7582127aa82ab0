import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.matrix import local
from app.matrix.local import LocalLauncher, ProcessFailedError, ProcessSpec, restart_pause_s

SLEEPER = "import signal, sys, time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def spec(tmp_path: Path, code: str, *, name: str = "p", grace_s: float = 5) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        argv=[sys.executable, "-c", code],
        env={},
        log_path=tmp_path / f"{name}.log",
        stop_grace_s=grace_s,
    )


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def ups(tmp_path: Path) -> int:
    log = tmp_path / "p.log"
    return log.read_text().count("up\n") if log.exists() else 0


async def test_a_killed_process_comes_back_and_stop_ends_it(tmp_path: Path) -> None:
    events: list[str] = []
    noted: list[int] = []
    launcher = LocalLauncher(events.append, on_restart=lambda: noted.append(launcher.pids()["p"]))
    launcher.start(spec(tmp_path, SLEEPER))
    await until(lambda: ups(tmp_path) == 1)
    first = launcher.pids()["p"]
    os.kill(first, 9)
    await until(lambda: ups(tmp_path) == 2)
    assert launcher.pids()["p"] != first
    assert noted == [launcher.pids()["p"]]
    assert "SIGKILL" in events[0]
    await launcher.stop_all()
    assert launcher.pids() == {}


async def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    events: list[str] = []
    launcher = LocalLauncher(events.append)
    launcher.start(spec(tmp_path, STUBBORN, grace_s=0.2))
    await until(lambda: ups(tmp_path) == 1)
    await launcher.stop_all()
    assert events == ["p did not stop within 0 s: killed"]


async def test_a_process_that_never_lives_is_given_up_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "FIRST_PAUSE_S", 0.001)
    launcher = LocalLauncher(lambda line: None)
    launcher.start(spec(tmp_path, "import sys; sys.exit('no such model')"))
    with pytest.raises(ProcessFailedError, match="(?s)p died 5 times.*status 1.*no such model"):
        await asyncio.wait_for(launcher.wait_failed(), 30)
    await launcher.stop_all()


async def test_two_processes_of_one_name_are_refused(tmp_path: Path) -> None:
    launcher = LocalLauncher(lambda line: None)
    launcher.start(spec(tmp_path, SLEEPER))
    with pytest.raises(ValueError, match="already running"):
        launcher.start(spec(tmp_path, SLEEPER))
    await launcher.stop_all()


def test_pauses_double_up_to_a_limit() -> None:
    assert [restart_pause_s(deaths) for deaths in (0, 1, 2, 3, 4, 5, 9)] == [0.5, 0.5, 1, 2, 4, 8, 8]
