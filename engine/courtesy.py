"""How much of a shared processor a worker claims: first tokens that somebody waits for, then running answers, then
long prompts.

Linux weighs sessions against each other, not threads: where autogroups are on, the niceness of a thread counts only
inside its own session, and what a worker process claims against its neighbours is the niceness of its group
(`/proc/self/autogroup`, sched(7)). It can be raised and taken back at any time without privileges.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

AUTOGROUP = Path("/proc/self/autogroup")
ENABLED = Path("/proc/sys/kernel/sched_autogroup_enabled")
LONG_TOKENS = 512
"""Tokens to compute from which a prompt is long: nobody expects its first token at once."""
DECODE_NICENESS = 7
"""A fifth of the weight of a neighbour of niceness 0 (215 against 1024): a short prompt slows answers down for a
moment, where answers at equal weight would keep its first token waiting for twice as long."""
LONG_NICENESS = 12
"""A third of the weight of a neighbour that decodes (70 against 215)."""


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
        niceness = niceness_of(
            [p.num_tokens - p.local_tokens - p.fetched_tokens for p in prompts], num_decode
        )
        if niceness == self._niceness:
            return
        # The kernel may ask to come again in a tenth of a second: the next step does.
        with contextlib.suppress(OSError):
            self._autogroup.write_text(str(niceness))
            self._niceness = niceness


def niceness_of(to_compute: Sequence[int], num_decode: int) -> int:
    """For a step over prompts that have so many tokens to compute, and so many decode rows (pure)."""
    if any(tokens < LONG_TOKENS for tokens in to_compute):
        return 0
    return DECODE_NICENESS if num_decode else LONG_NICENESS
