"""Contention: flows over shared links get their max-min fair rates, on a clock that the caller turns.

Nothing here knows the wall clock. `SharedLinks` keeps how many bytes every flow still has; callers say what
time it is (`now`, seconds), add and remove flows, ask when the next one will be through and advance to that
instant. Rates change only when the set of flows or a link does, so in between everything drains linearly.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes on their way over links.

    `weight`: its share against others on a full link. `limit_bytes_per_s`: what its ends can move at most.
    """

    links: tuple[str, ...]
    num_bytes: float
    weight: float = 1.0
    limit_bytes_per_s: float | None = None


def max_min_rates(flows: Sequence[Flow], capacity: Mapping[str, float]) -> list[float]:
    """Weighted max-min fair rates in bytes per second, one per flow.

    The fullest link decides first: its flows share it by weight and are settled; what they take is deducted
    elsewhere; then the next fullest. A flow's own limit counts as a link of its own. Raises `ValueError` for
    a flow that nothing bounds and `KeyError` for an unknown link.
    """
    unhindered = _rates_at_their_limits(flows, capacity)
    if unhindered is not None:
        return unhindered
    rates = [0.0] * len(flows)
    free: dict[str, float] = {}
    users: dict[str, set[int]] = {}
    weight_on: dict[str, float] = {}
    links_of: list[tuple[str, ...]] = []
    for i, flow in enumerate(flows):
        links = tuple(dict.fromkeys(flow.links))
        free.update({link: capacity[link] for link in links})
        if flow.limit_bytes_per_s is not None:
            free[f"limit of flow {i}"] = flow.limit_bytes_per_s
            links += (f"limit of flow {i}",)
        if not links:
            raise ValueError(f"flow {i} has neither links nor a limit: its rate would be infinite")
        links_of.append(links)
        for link in links:
            users.setdefault(link, set()).add(i)
            weight_on[link] = weight_on.get(link, 0.0) + flow.weight
    while users:
        fullest = min(users, key=lambda link: free[link] / weight_on[link])
        level = free[fullest] / weight_on[fullest]
        for i in sorted(users[fullest]):
            weight = flows[i].weight
            rates[i] = min(level * weight, *(free[link] for link in links_of[i]))
            for link in links_of[i]:
                free[link] -= rates[i]
                weight_on[link] -= weight
                users[link].discard(i)
                if not users[link]:
                    del users[link]
    return rates


def _rates_at_their_limits(flows: Sequence[Flow], capacity: Mapping[str, float]) -> list[float] | None:
    """The flows' own limits when no link is full at them, which most often is so; else None."""
    load: dict[str, float] = {}
    limits: list[float] = []
    for flow in flows:
        limit = flow.limit_bytes_per_s
        if limit is None:
            return None
        limits.append(limit)
        for link in dict.fromkeys(flow.links):
            total = load.get(link, 0.0) + limit
            if total > capacity[link]:
                return None
            load[link] = total
    return limits


@dataclass(slots=True)
class _Underway:
    flow: Flow
    left_bytes: float
    rate: float = 0.0


class SharedLinks(Generic[Key]):
    """Flows in progress over links of given rates.

    `carried` counts the bytes that each link has carried so far. All methods that take `now` first advance to
    it and raise `ValueError` if it lies in the past.
    """

    def __init__(self, capacity: Mapping[str, float], now: float = 0.0) -> None:
        self.capacity = dict(capacity)
        self.carried: dict[str, float] = {}
        self.now = now
        self._flows: dict[Key, _Underway] = {}
        self._done: list[tuple[float, Key]] = []

    def __len__(self) -> int:
        return len(self._flows)

    def add(self, key: Key, flow: Flow, now: float) -> None:
        """Start a flow. Raises `ValueError` if the key is in use."""
        self._drain(now)
        if key in self._flows:
            raise ValueError(f"flow {key!r} is already underway")
        self._flows[key] = _Underway(flow, flow.num_bytes)
        self._share()

    def remove(self, key: Key, now: float) -> float:
        """Stop a flow; returns the bytes it had left. Raises `KeyError` if it is not underway."""
        self._drain(now)
        left = self._flows.pop(key).left_bytes
        self._share()
        return left

    def set_capacity(self, link: str, bytes_per_s: float, now: float) -> None:
        """Change a link's rate; 0 stops what runs over it."""
        self._drain(now)
        self.capacity[link] = bytes_per_s
        self._share()

    def next_completion_at(self) -> float | None:
        """When `advance` next has a flow to report if nothing changes; None when it never will."""
        if self._done:
            return self.now
        return min(
            (self.now + u.left_bytes / u.rate for u in self._flows.values() if u.rate > 0), default=None
        )

    def advance(self, now: float) -> list[tuple[float, Key]]:
        """Let time pass until `now`; returns (instant, key) of every flow that got through, in order."""
        self._drain(now)
        done, self._done = self._done, []
        return done

    def rate(self, key: Key) -> float:
        """The present rate of a flow in bytes per second. Raises `KeyError` if it is not underway."""
        return self._flows[key].rate

    def link_rates(self) -> dict[str, float]:
        """Bytes per second on every link in use."""
        load: dict[str, float] = {}
        for underway in self._flows.values():
            for link in underway.flow.links:
                load[link] = load.get(link, 0.0) + underway.rate
        return load

    def _drain(self, now: float) -> None:
        if now < self.now:
            raise ValueError(f"time went back from {self.now} to {now}")
        while self._flows:
            ends = {key: self.now + u.left_bytes / u.rate for key, u in self._flows.items() if u.rate > 0}
            first = min(ends.values(), default=float("inf"))
            until = min(first, now)
            for underway in self._flows.values():
                moved = min(underway.left_bytes, underway.rate * (until - self.now))
                underway.left_bytes -= moved
                for link in underway.flow.links:
                    self.carried[link] = self.carried.get(link, 0.0) + moved
            self.now = until
            if first > now:
                break
            for key in [key for key, end in ends.items() if end <= first]:
                del self._flows[key]
                self._done.append((first, key))
            self._share()
        self.now = now

    def _share(self) -> None:
        underway = list(self._flows.values())
        for one, rate in zip(underway, max_min_rates([u.flow for u in underway], self.capacity), strict=True):
            one.rate = rate
