"""A moment of rest for a store that has just failed: an outage costs milliseconds, and not a timeout each time."""

import time

_PAUSE_S = 0.25


class Rest:
    """Leaves a failed store alone for a moment. Thread-safe: a float is written whole."""

    def __init__(self) -> None:
        self._until = 0.0

    def failed(self) -> None:
        """It failed now."""
        self._until = time.monotonic() + _PAUSE_S

    @property
    def over(self) -> bool:
        """Whether it may be asked again."""
        return time.monotonic() >= self._until
