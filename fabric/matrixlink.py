"""MatrixLink: UB transfers spread over the sub-planes, in classes of service, led around what breaks.

A transfer is cut into one stripe per pair of dies and sub-plane. Each stripe takes one L2 chip of its
sub-plane, picked by a fixed rule from the ends so that transfers spread over the chips, among the ways that
work. When a component fails, the bytes that were left on dead links are cut anew over the ways that remain.

A transfer on an otherwise idle fabric takes exactly `cost.transfer_time`; sharing only makes it longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fabric.cost import path_cost
from fabric.planes import Operation
from fabric.sharing import Flow, SharedLinks
from fabric.topology import SUPERNODE, FabricError, Place, Route, Topology

QoS = Literal["expert", "cache", "bulk"]
"""`expert`: the exchange of MoE decode steps; `cache`: KV blocks; `bulk`: weights and persistence."""

QOS_WEIGHT: dict[QoS, float] = {"expert": 16.0, "cache": 4.0, "bulk": 1.0}
"""Shares on a full link. Our choice: the paper says that MatrixLink has QoS, not how."""


def stripes(
    src: Place,
    dst: Place,
    num_bytes: float,
    *,
    qos: QoS = "cache",
    op: Operation | None = None,
    topology: Topology = SUPERNODE,
) -> list[Flow]:
    """The flows that carry a UB transfer, equal parts over distinct sub-planes and pairs of dies.

    Raises `FabricError` for impossible places or when no way is left.
    """
    cost = path_cost(src, dst, "ub", op, topology)
    lanes: dict[tuple[str, str, str], list[Route]] = {}
    for route in topology.routes(src, dst, "ub"):
        lanes.setdefault((route.nodes[0], route.nodes[1], route.nodes[-1]), []).append(route)
    salt = src.index + dst.index
    picked = [routes[(salt + i) % len(routes)] for i, routes in enumerate(lanes.values())]
    part, limit = num_bytes / len(picked), cost.bytes_per_s / len(picked)
    return [Flow(route.links, part, QOS_WEIGHT[qos], limit) for route in picked]


@dataclass(slots=True)
class _Underway:
    src: Place
    dst: Place
    qos: QoS
    op: Operation | None
    startup_s: float
    open_stripes: set[int]
    next_stripe: int = 0


class MatrixLink:
    """UB transfers in progress on one supernode; the caller turns the clock (`now`, seconds)."""

    def __init__(self, topology: Topology = SUPERNODE, now: float = 0.0) -> None:
        self.topology = topology
        self.links: SharedLinks[tuple[str, int]] = SharedLinks(topology.capacity, now)
        self._transfers: dict[str, _Underway] = {}
        self._landing: list[tuple[float, str]] = []

    def start(
        self,
        transfer_id: str,
        src: Place,
        dst: Place,
        num_bytes: int,
        now: float,
        *,
        qos: QoS = "cache",
        op: Operation | None = None,
    ) -> None:
        """Send bytes. Raises `FabricError` for impossible places, a known id, or when no way is left."""
        if transfer_id in self._transfers:
            raise FabricError(f"transfer {transfer_id!r} is already underway")
        self._collect(now)
        startup_s = path_cost(src, dst, "ub", op, self.topology).startup_s
        self._transfers[transfer_id] = _Underway(src, dst, qos, op, startup_s, set())
        self._send(transfer_id, num_bytes, now)

    def fail(self, now: float, *components: str) -> list[str]:
        """Components break; what ran over them takes other ways. Returns ids of transfers cut off for good."""
        return self._change(self.topology.without(*components), now)

    def repair(self, now: float, *components: str) -> None:
        """Components work again; later stripes use them, those underway stay where they are."""
        healthy = Topology(self.topology.num_nodes, self.topology.failed - set(components))
        self._change(healthy, now)

    def next_event_at(self) -> float | None:
        """When `advance` next has something to tell if nothing changes; None when it never will."""
        instants = [at for at, _ in self._landing]
        drained_at = self.links.next_completion_at()
        if drained_at is not None:
            instants.append(drained_at)
        return max(min(instants), self.links.now) if instants else None

    def advance(self, now: float) -> list[tuple[float, str]]:
        """Let time pass; returns (instant, id) of the transfers that have arrived, in order."""
        self._collect(now)
        arrived = sorted(item for item in self._landing if item[0] <= now)
        self._landing = [item for item in self._landing if item[0] > now]
        return arrived

    def _send(self, transfer_id: str, num_bytes: float, now: float) -> None:
        transfer = self._transfers[transfer_id]
        flows = stripes(
            transfer.src, transfer.dst, num_bytes, qos=transfer.qos, op=transfer.op, topology=self.topology
        )
        for flow in flows:
            self.links.add((transfer_id, transfer.next_stripe), flow, now)
            transfer.open_stripes.add(transfer.next_stripe)
            transfer.next_stripe += 1

    def _collect(self, now: float) -> None:
        for at, (transfer_id, stripe) in self.links.advance(now):
            transfer = self._transfers[transfer_id]
            transfer.open_stripes.discard(stripe)
            if not transfer.open_stripes:
                del self._transfers[transfer_id]
                self._landing.append((at + transfer.startup_s, transfer_id))

    def _change(self, topology: Topology, now: float) -> list[str]:
        self._collect(now)
        self.topology = topology
        for link, rate in topology.capacity.items():
            if self.links.capacity[link] != rate:
                self.links.set_capacity(link, rate, now)
        lost = []
        for transfer_id, transfer in list(self._transfers.items()):
            keys = [(transfer_id, stripe) for stripe in transfer.open_stripes]
            if all(self.links.rate(key) > 0 for key in keys):
                continue
            left = sum(self.links.remove(key, now) for key in keys)
            transfer.open_stripes.clear()
            try:
                self._send(transfer_id, left, now)
            except FabricError:
                del self._transfers[transfer_id]
                lost.append(transfer_id)
        return lost


def seconds_beside(
    transfers: Sequence[tuple[Place, Place, int]], qos: Sequence[QoS], topology: Topology = SUPERNODE
) -> list[float]:
    """Seconds of UB transfers (from, to, bytes) that begin at the same instant, each in its class of service.

    Raises `FabricError` for impossible places or when no way is left.
    """
    link = MatrixLink(topology)
    for number, ((src, dst, num_bytes), service) in enumerate(zip(transfers, qos, strict=True)):
        link.start(str(number), src, dst, num_bytes, 0.0, qos=service)
    found: dict[str, float] = {}
    while (at := link.next_event_at()) is not None:
        found |= {number: at for at, number in link.advance(at)}
    return [found[str(number)] for number in range(len(transfers))]
