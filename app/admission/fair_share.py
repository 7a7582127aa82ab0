"""Fair shares between tenants in tokens, not in turns: the Virtual Token Counter (pure: no IO, no clock).

Each tenant's counter grows by what it was served, divided by its weight; the tenant with the least goes next. A tenant
that comes back from idleness is lifted to the least counter among those that wait, so that nobody saves up a claim.
After Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024; expected output is charged when a request
is released and settled when it is over, which keeps a tenant of long answers from running ahead meanwhile.
"""

from collections import deque
from collections.abc import Collection, Iterable

MAX_IDLE_TENANTS = 1024
"""Counters kept of tenants that wait for nothing; beyond it those that have the least to lose are forgotten."""


class VirtualTokenCounters:
    """The counters of all tenants. A tenant is known from its first `join`."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._floor = 0.0
        """Counter of the tenant that was served last: where a lonely newcomer begins."""

    def __getitem__(self, tenant: str) -> float:
        """Virtual tokens served to `tenant`, lifts included; where it would begin when it is not known."""
        return self._counters.get(tenant, self._floor)

    def join(self, tenant: str, waiting: Collection[str]) -> None:
        """`tenant` begins to wait for something, beside those in `waiting`."""
        others = [self[other] for other in waiting if other != tenant]
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), min(others, default=self._floor))
        if len(self._counters) > MAX_IDLE_TENANTS + len(waiting):
            self._forget({tenant, *waiting})

    def charge(self, tenant: str, virtual_tokens: float, weight: float) -> None:
        """`tenant` was served (or, below zero, was charged too much before)."""
        self._counters[tenant] = self[tenant] + virtual_tokens / weight
        if virtual_tokens > 0:
            self._floor = max(self._floor, self._counters[tenant])

    def next(self, waiting: Iterable[str]) -> str:
        """The tenant that goes next: the least served; among equals the first by name."""
        return min(waiting, key=lambda tenant: (self[tenant], tenant))

    def _forget(self, kept: Collection[str]) -> None:
        idle = sorted((counter, tenant) for tenant, counter in self._counters.items() if tenant not in kept)
        for _, tenant in idle[: len(idle) // 2]:
            del self._counters[tenant]


def jain_index(shares: Collection[float]) -> float | None:
    """Jain's fairness index (Σx)² / (n Σx²): 1 when all are equal, 1/n when one has all; None without service."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


class FairnessWindow:
    """How equal the weighted service of tenants was that wanted more than they got, over the last `window_s` seconds.

    Only time in which two or more tenants waited is looked at, and of it only tenants that waited at least half: who
    asks for little is rightly served little.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._slices: deque[tuple[float, float, frozenset[str], dict[str, float]]] = deque()
        """Start, seconds contended, who waited, weighted service: one for each look."""
        self._served: dict[str, float] = {}
        self._looked_at: float | None = None

    def served(self, tenant: str, virtual_tokens: float, weight: float) -> None:
        """`tenant` was served since the last look."""
        self._served[tenant] = self._served.get(tenant, 0.0) + virtual_tokens / weight

    def look(self, waiting: Collection[str], now: float) -> None:
        """These tenants have been waiting since the last look."""
        began, self._looked_at = self._looked_at, now
        served, self._served = self._served, {}
        if began is not None and len(waiting) >= 2:
            self._slices.append((began, now - began, frozenset(waiting), served))
        while self._slices and self._slices[0][0] < now - self._window_s:
            self._slices.popleft()

    def index(self) -> float | None:
        """Jain's index over the window; None when no two tenants competed."""
        contended_s = sum(seconds for _, seconds, _, _ in self._slices)
        waited_s: dict[str, float] = {}
        service: dict[str, float] = {}
        for _, seconds, waiting, served in self._slices:
            for tenant in waiting:
                waited_s[tenant] = waited_s.get(tenant, 0.0) + seconds
            for tenant, tokens in served.items():
                service[tenant] = service.get(tenant, 0.0) + tokens
        rivals = [tenant for tenant, seconds in waited_s.items() if seconds >= contended_s / 2]
        return jain_index([service.get(tenant, 0.0) for tenant in rivals]) if len(rivals) > 1 else None
