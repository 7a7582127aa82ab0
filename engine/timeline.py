"""Instants of one request on one process's clock, and the phases that follow from them.

A request is in one phase at a time, so phases follow one another without gap or overlap and add up to its life.
Work that runs beside a phase (blocks published while later ones are computed) shows in the transfers, with its own
measured seconds; the phase `publish` is only the wait for acknowledgements that nothing else hid.
"""

from collections.abc import Iterable
from typing import Literal

from engine.protocol import Phase

PhaseName = Literal["queue", "lookup", "fetch", "prefill", "publish", "decode"]


class Timeline:
    """The phases of a request so far. Instants are seconds on one clock; `received_at` is zero of the result."""

    def __init__(self, received_at: float) -> None:
        self._received_at = received_at
        self._phases: list[Phase] = []
        self._current: PhaseName | None = "queue"
        self._entered_at = received_at

    @property
    def current(self) -> PhaseName | None:
        """The phase the request is in; None once closed."""
        return self._current

    def enter(self, phase: PhaseName, at: float) -> None:
        """End the current phase and begin `phase`; nothing happens when the request is in it already.

        Raises ValueError when `at` lies before the current phase began, or the timeline is closed.
        """
        if phase != self._current:
            self._end(at)
            self._current = phase

    def close(self, at: float) -> None:
        """End the current phase and with it the request. Closing twice changes nothing."""
        if self._current is not None:
            self._end(at)
            self._current = None

    def phases(self) -> list[Phase]:
        """The ended phases, in order, counted from receipt."""
        return list(self._phases)

    def _end(self, at: float) -> None:
        if self._current is None:
            raise ValueError("the timeline is closed")
        if at < self._entered_at:
            raise ValueError(f"{self._current} began at {self._entered_at}, it cannot end at {at}")
        self._phases.append(
            Phase(
                phase=self._current,
                start_s=self._entered_at - self._received_at,
                duration_s=at - self._entered_at,
            )
        )
        self._entered_at = at


def shifted(phases: Iterable[Phase], by_s: float) -> list[Phase]:
    """The same phases on a timeline whose zero lies `by_s` seconds earlier."""
    return [Phase(phase=p.phase, start_s=p.start_s + by_s, duration_s=p.duration_s) for p in phases]
