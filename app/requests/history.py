"""The records of requests under way and of the last ones that ended; memory is bounded."""

from collections import OrderedDict
from collections.abc import Iterator

from app.requests.record import RequestRecord


class History:
    """Records by id. At most `max_finished` ended ones are kept, oldest forgotten first."""

    def __init__(self, max_finished: int) -> None:
        self._max_finished = max_finished
        self._running: dict[str, RequestRecord] = {}
        self._finished: OrderedDict[str, RequestRecord] = OrderedDict()

    def begin(self, record: RequestRecord) -> None:
        """Keep a record while its request runs."""
        self._running[record.request_id] = record

    def end(self, record: RequestRecord) -> None:
        """The request is over: its record now ages."""
        self._running.pop(record.request_id, None)
        self._finished[record.request_id] = record
        while len(self._finished) > self._max_finished:
            self._finished.popitem(last=False)

    def get(self, request_id: str) -> RequestRecord | None:
        """The record of that id, or None when it is unknown or forgotten."""
        return self._running.get(request_id) or self._finished.get(request_id)

    def recent(self, limit: int) -> Iterator[RequestRecord]:
        """Running requests, then ended ones, newest first, at most `limit`."""
        for number, record in enumerate(
            [*reversed(self._running.values()), *reversed(self._finished.values())]
        ):
            if number >= limit:
                return
            yield record
