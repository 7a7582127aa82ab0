"""How much of a shared processor a worker claims: while it computes nothing but long prompts, it lets others go first.

Linux weighs sessions against each other, not threads: where autogroups are on, the niceness of a thread counts only
inside its own session, and what a worker process claims against its neighbours is the niceness of its group
(`/proc/self/autogroup`, sched(7)). It can be raised and taken back at any time without privileges.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

AUTOGROUP = Path("/proc/self/autogroup")
ENABLED = Path("/proc/sys/kernel/sched_autogroup_enabled")
LONG_TOKENS = 512
"""Tokens to compute from which a prompt is long: nobody expects its first token at once."""
NICENESS = 4
"""Two fifths of the weight of a neighbour of niceness 0 (423 against 1024)."""


class Prompt(Protocol):
    """What is needed of a sequence: its tokens, and how many of them were found in a cache."""

    local_tokens: int
    fetched_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        ...


class Courtesy:
    """The niceness of this process's group, by what the worker computes. Without autogroups it does nothing."""

    def __init__(self, autogroup: Path = AUTOGROUP) -> None:
        self._autogroup = autogroup
        self._niceness = 0

    @classmethod
    def of_process(cls) -> "Courtesy | None":
        """For a process that leads a session of its own; None where others would be held back with it."""
        with contextlib.suppress(OSError):
            if os.getsid(0) == os.getpid() and ENABLED.read_text().strip() == "1":
                return cls()
        return None

    def before(self, prompts: Iterable[Prompt], num_decode: int) -> None:
        """Choose the niceness for a step of a worker that runs `prompts`, with so many decode rows."""
        is_patient = num_decode == 0 and all(
            p.num_tokens - p.local_tokens - p.fetched_tokens >= LONG_TOKENS for p in prompts
        )
        niceness = NICENESS if is_patient else 0
        if niceness == self._niceness:
            return
        # The kernel may ask to come again in a tenth of a second: the next step does.
        with contextlib.suppress(OSError):
            self._autogroup.write_text(str(niceness))
            self._niceness = niceness
