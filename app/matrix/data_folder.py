"""The folder in which one running service keeps everything it writes; one service at a time.

    lock          held while the service runs; the system lets go of it however the service ends
    service.json  where the running service can be reached, and its processes
    logs/ redis/  written by the processes

A service that was killed leaves `service.json` behind. The next one waits until those processes are gone, since they
leave by themselves within a second, and ends the ones that do not.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import psutil

STOPPING_S = 5.0
"""How long a service that is just stopping may still hold the lock before that is an error."""
LEAVE_S = 12.0
"""How long processes of a killed service may take to leave by themselves."""


class DataFolderError(Exception):
    """The folder cannot be used; the message says why and what to do."""


class DataFolder:
    """A locked data folder, as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._service_file = path / "service.json"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Lock the folder and see the last service out. Raises DataFolderError."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DataFolderError(
                f"data folder {self.path}: {error.strerror}; choose another with --data-dir"
            ) from error
        if not self._locked_within(STOPPING_S):
            os.close(self._lock)
            raise DataFolderError(
                f"another service runs in {self.path}: stop it, or give this one its own folder with --data-dir"
            )
        self._end_stale_processes()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service_file.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    def write_service(self, urls: dict[str, str], pids: dict[str, int]) -> None:
        """Note where the service is and which processes it has."""
        processes = [
            {"name": name, "pid": pid, "created_at": psutil.Process(pid).create_time()}
            for name, pid in pids.items()
            if psutil.pid_exists(pid)
        ]
        temporary = self._service_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({**urls, "pid": os.getpid(), "processes": processes}, indent=1))
        temporary.replace(self._service_file)

    def _locked_within(self, timeout_s: float) -> bool:
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(cast("int", self._lock), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= give_up_at:
                    return False
                time.sleep(0.05)
            else:
                return True

    def _end_stale_processes(self) -> None:
        try:
            noted = json.loads(self._service_file.read_text())["processes"]
        except (OSError, ValueError, KeyError):
            return
        stale = []
        for entry in noted:
            try:
                process = psutil.Process(entry["pid"])
                # The same id with another birthday is somebody else's process.
                if abs(process.create_time() - entry["created_at"]) < 1:
                    stale.append(process)
            except psutil.NoSuchProcess:
                continue
        _, still_there = psutil.wait_procs(stale, timeout=LEAVE_S)
        for process in still_there:
            process.kill()
        psutil.wait_procs(still_there, timeout=5)
        self._service_file.unlink(missing_ok=True)
