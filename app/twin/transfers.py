"""KV on its way in the simulation: handovers and pool loads that overlap share links by max-min fairness.

The rates are those of `fabric.sharing`; this only keeps what each transfer is for and when the next one arrives.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.sharing import Flow, SharedLinks


@dataclass(frozen=True, slots=True)
class Shipment:
    """KV to be moved: `startup_s` passes in any case; `flow` shares its links with others, None shares nothing."""

    startup_s: float
    flow: Flow | None = None

    @property
    def idle_s(self) -> float:
        """Seconds when nobody else sends."""
        if self.flow is None or not self.flow.num_bytes:
            return self.startup_s
        assert self.flow.limit_bytes_per_s is not None, "a shipment knows what its ends can move"
        return self.startup_s + self.flow.num_bytes / self.flow.limit_bytes_per_s


@dataclass(frozen=True, slots=True)
class Cargo:
    """A shipment under way and what it is for: the event that its end brings, to which attempt of the job."""

    kind: str
    attempt: int
    sent_at: float
    shipment: Shipment


class Transfers:
    """Shipments under way, by number. All instants are virtual seconds that the caller passes in."""

    def __init__(self, capacity: Mapping[str, float]) -> None:
        self._links: SharedLinks[int] = SharedLinks(capacity)
        self._cargo: dict[int, Cargo] = {}

    def __contains__(self, number: object) -> bool:
        return number in self._cargo

    def start(self, number: int, cargo: Cargo, now: float) -> None:
        """Send bytes; what flows already slows down as its links fill. Raises `ValueError` for a number in use."""
        flow = cargo.shipment.flow
        assert flow is not None, "what shares nothing need not be sent over links"
        self._links.add(number, flow, now)
        self._cargo[number] = cargo

    def cancel(self, number: int, now: float) -> None:
        """Nobody waits for these bytes any more; nothing happens when they are not under way."""
        if self._cargo.pop(number, None) is not None:
            self._links.remove(number, now)

    def next_at(self) -> float | None:
        """When `arrived` next has something to tell if nothing changes."""
        return self._links.next_completion_at()

    def arrived(self, now: float) -> list[tuple[float, int, Cargo]]:
        """Let time pass; (instant, number, cargo) of what got through, in order."""
        found = []
        for at, number in self._links.advance(now):
            cargo = self._cargo.pop(number)
            found.append((at + cargo.shipment.startup_s, number, cargo))
        return found

    def rewire(self, capacity: Mapping[str, float], now: float) -> list[int]:
        """Links have other rates now; numbers of what cannot go on, which is dropped."""
        for link, rate in capacity.items():
            if self._links.capacity[link] != rate:
                self._links.set_capacity(link, rate, now)
        stuck = [number for number in self._cargo if self._links.rate(number) <= 0]
        for number in stuck:
            self.cancel(number, now)
        return stuck
