"""Who else uses this machine's cores while the service is measured: a figure taken beside neighbours is no figure.

What all cores did, less what the service's processes and this one did, is the neighbours' part. It is known only for a
service whose workers run on this very machine.
"""

import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import psutil

EVERY_S = 0.2
OWN_NOISE_CORES = 0.15
"""Kernel work (network, interrupts) that the service itself causes and no process is charged with."""


class Neighbours:
    """Samples while it is entered. `share(a, b)` tells the cores that others kept busy between two instants.

    Instants are of `time.perf_counter`. `worker_pids` are the service's workers; their common parent and all its
    children count as the service. When one of them is not on this machine nothing is sampled and every share is None.
    """

    def __init__(self, worker_pids: Iterable[int]) -> None:
        self._roots = _roots(list(worker_pids))
        self._samples: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._roots:
            self._thread = threading.Thread(target=self._run, name="neighbours", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def share(self, start: float, end: float) -> float | None:
        """Mean cores that neighbours kept busy over the samples touching the span; None when unknown."""
        touching = [
            (until - since, busy) for since, until, busy in self._samples if until > start and since < end
        ]
        seconds = sum(span for span, _ in touching)
        if seconds <= 0:
            return None
        return max(0.0, sum(span * busy for span, busy in touching) / seconds - OWN_NOISE_CORES)

    def _run(self) -> None:
        before = (time.perf_counter(), _machine_s(), self._own_s())
        while not self._stop.wait(EVERY_S):
            now = (time.perf_counter(), _machine_s(), self._own_s())
            span = now[0] - before[0]
            self._samples.append((before[0], now[0], ((now[1] - before[1]) - (now[2] - before[2])) / span))
            before = now

    def _own_s(self) -> float:
        """CPU seconds so far of the service and of this process; what a process that has ended used stays counted."""
        total = _process_s(psutil.Process())
        for root in self._roots:
            total += _process_s(root)
            try:
                children = root.children(recursive=True)
            except psutil.NoSuchProcess:
                children = []
            total += sum(_process_s(child) for child in children)
        return total


def _roots(pids: list[int]) -> list[psutil.Process]:
    """The supervisors of these workers (a worker started by hand stands for itself); empty when one is elsewhere."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            worker = psutil.Process(pid)
            if "engine.server" not in worker.cmdline():
                return []
            parent = worker.parent()
            root = worker if parent is None or "up" not in parent.cmdline() else parent
        except psutil.Error:
            return []
        found[root.pid] = root
    return list(found.values())


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _process_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
