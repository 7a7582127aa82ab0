"""How many threads a worker gets when nobody says."""

import os

MOST_THREADS = 8
"""Beyond this a small model gains nothing: a step becomes all synchronisation."""


def default_threads() -> int:
    """One per core that this process may use, at most `MOST_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, cores)
