"""Idle channels by endpoint: a thread at work takes one for itself and gives it back."""

import contextlib
import threading
from collections.abc import Iterator

from memory_pool.resp import Channel, Endpoint


class Channels:
    """Thread-safe. A channel on which anything went wrong is closed, not kept."""

    def __init__(self) -> None:
        self._idle: dict[Endpoint, list[Channel]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def to(self, endpoint: Endpoint) -> Iterator[Channel]:
        """A channel for the body of a `with`. Raises ChannelError when the server cannot be reached."""
        with self._lock:
            idle = self._idle.get(endpoint)
            channel = idle.pop() if idle else None
        if channel is None:
            channel = Channel(endpoint)
        try:
            yield channel
        except BaseException:
            channel.close()
            raise
        with self._lock:
            self._idle.setdefault(endpoint, []).append(channel)

    def close(self) -> None:
        """Close those idle. Idempotent."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for channels in idle.values():
            for channel in channels:
                channel.close()
