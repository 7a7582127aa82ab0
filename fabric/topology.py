"""The supernode as data: who is connected to whom, by which links, and what is broken.

A full CloudMatrix384 (arXiv 2506.12708 v2, section 3.3) has 48 nodes of 8 NPUs with 2 dies each and 4 CPUs.
Inside a node seven L1 switch chips, one per UB sub-plane, join its 16 dies and 4 CPUs; each L1 chip has 16
links of 28 GB/s up to the L2 chips of its sub-plane, 16 chips with 48 ports. So every L2 chip has one link
from every node, and nothing is oversubscribed. Nodes come in blocks of 12 with 14 logical (28 physical) L2
switches (v3, Table 10).

Names: places are `npu:I`, `die:I`, `cpu:I`; chips `l1:NODE.SUBPLANE`, `l2:SUBPLANE.CHIP`; optical modules
`optic:NODE.SUBPLANE.MODULE`, each carrying two links of an L1 chip (56 modules of 400G per node); network
cards `nic:DIE`. A link is `FROM>TO`, one direction.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil
from typing import Literal

from fabric.planes import ON_PACKAGE, ROCE_DIE, TRANSCEIVERS_PER_DIE, UB_CPU, UB_LANE, VPC_NODE, Plane

PlaceKind = Literal["npu", "die", "cpu"]

NPUS_PER_NODE = 8
DIES_PER_NPU = 2
DIES_PER_NODE = NPUS_PER_NODE * DIES_PER_NPU
CPUS_PER_NODE = 4
NODES_PER_RACK = 4
NUM_SUBPLANES = TRANSCEIVERS_PER_DIE
L1_UPLINKS = 16
L2_PORTS = 48
NODES_PER_BLOCK = 12
L2_CHIPS_PER_BLOCK = 4
"""Per sub-plane: 14 logical = 28 physical chips per block, over seven sub-planes."""
LINKS_PER_OPTIC = 2
MAX_NODES = 48

PER_NODE: dict[PlaceKind, int] = {"npu": NPUS_PER_NODE, "die": DIES_PER_NODE, "cpu": CPUS_PER_NODE}


class FabricError(ValueError):
    """A place, size or component that the fabric does not have; the message names it."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """An end of a transfer. An `npu` is a package: both its dies move the bytes together."""

    kind: PlaceKind
    index: int

    @property
    def node(self) -> int:
        """The node (0-based) this place is in."""
        return self.index // PER_NODE[self.kind]

    @property
    def dies(self) -> tuple[int, ...]:
        """The dies whose links carry this place's bytes; empty for a CPU."""
        if self.kind == "npu":
            return tuple(self.index * DIES_PER_NPU + i for i in range(DIES_PER_NPU))
        return (self.index,) if self.kind == "die" else ()

    @property
    def is_cpu(self) -> bool:
        """Whether the place is host memory."""
        return self.kind == "cpu"

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class Route:
    """One way through a plane: the chips and places passed, and the links between them, in order."""

    nodes: tuple[str, ...]

    @property
    def links(self) -> tuple[str, ...]:
        """The directed links between the nodes passed, none repeated."""
        return tuple(f"{a}>{b}" for a, b in zip(self.nodes, self.nodes[1:], strict=False))


@dataclass(frozen=True)
class Topology:
    """A supernode of `num_nodes` nodes; `failed` names links, chips, optical modules and network cards out of
    order.

    Raises `FabricError` for an impossible size or a failed component that does not exist.
    """

    num_nodes: int = MAX_NODES
    failed: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise FabricError(f"num_nodes: {self.num_nodes} is not between 1 and {MAX_NODES}")
        for name in sorted(self.failed):
            self._dead_links(name)

    @classmethod
    def of_npus(cls, num_npus: int) -> "Topology":
        """The supernode of `num_npus`. Raises `FabricError` unless that is whole nodes within 384 NPUs."""
        if num_npus < 1 or num_npus % NPUS_PER_NODE or num_npus > MAX_NODES * NPUS_PER_NODE:
            raise FabricError(
                f"num_npus: {num_npus} is not a multiple of {NPUS_PER_NODE} between {NPUS_PER_NODE} and "
                f"{MAX_NODES * NPUS_PER_NODE}"
            )
        return cls(num_npus // NPUS_PER_NODE)

    def without(self, *components: str) -> "Topology":
        """The same supernode with these links, chips, modules or cards out of order."""
        return replace(self, failed=self.failed | set(components))

    @property
    def num_npus(self) -> int:
        """NPU packages."""
        return self.num_nodes * NPUS_PER_NODE

    @property
    def num_dies(self) -> int:
        """NPU dies."""
        return self.num_nodes * DIES_PER_NODE

    @property
    def num_cpus(self) -> int:
        """Host CPUs."""
        return self.num_nodes * CPUS_PER_NODE

    @property
    def num_compute_racks(self) -> int:
        """Racks of four nodes."""
        return ceil(self.num_nodes / NODES_PER_RACK)

    @property
    def num_switch_racks(self) -> int:
        """Racks of L2 switches, one per block of 12 nodes."""
        return ceil(self.num_nodes / NODES_PER_BLOCK)

    @property
    def l2_chips_per_subplane(self) -> int:
        """L2 chips that the size needs in each sub-plane (16 for 48 nodes)."""
        return self.num_switch_racks * L2_CHIPS_PER_BLOCK

    @property
    def num_logical_switches(self) -> int:
        """Logical L2 switches, two physical chips each (56 for 48 nodes)."""
        return self.l2_chips_per_subplane * NUM_SUBPLANES // 2

    @property
    def switch_utilisation(self) -> float:
        """Share of the L2 ports in use: nodes over the nodes that the switches could serve (v3, Table 10)."""
        return self.num_nodes / (self.num_switch_racks * NODES_PER_BLOCK)

    def uplink_chip(self, node: int, uplink: int) -> int:
        """The L2 chip at the other end of an L1 chip's uplink; dealt round robin so that no chip exceeds 48
        ports.
        """
        return (node * L1_UPLINKS + uplink) % self.l2_chips_per_subplane

    def check(self, place: Place) -> None:
        """Raise `FabricError` if this supernode does not have the place."""
        count = PER_NODE[place.kind] * self.num_nodes
        if not 0 <= place.index < count:
            raise FabricError(f"{place}: this supernode has {place.kind}:0 to {place.kind}:{count - 1}")

    @cached_property
    def nominal(self) -> dict[str, float]:
        """Line rate of every link when nothing is broken, in bytes per second."""
        return dict(self._all_links())

    @cached_property
    def capacity(self) -> dict[str, float]:
        """Line rate that every link has left, in bytes per second; 0 for a dead link."""
        rates = self.nominal if not self.failed else dict(self.nominal)
        for name in self.failed:
            for link, lost in self._dead_links(name).items():
                rates[link] = max(0.0, rates[link] - lost)
        return rates

    def routes(self, src: Place, dst: Place, plane: Plane = "ub") -> list[Route]:
        """Every way from `src` to `dst` that works, shortest first.

        UB within a package is the die-to-die link; within a node, one route per sub-plane; between nodes, one
        per sub-plane and L2 chip. On RoCE a CPU is reached through its node's first NPU. Raises `FabricError`
        for places that do not exist, are the same, or hold one another.
        """
        routes = self._all_routes(src, dst, plane)
        if not self.failed:
            return list(routes)
        return [r for r in routes if all(self.capacity[k] > 0 for k in r.links)]

    def shortest_route(self, src: Place, dst: Place, plane: Plane = "ub") -> Route | None:
        """The first of `routes`, or None when no way is left."""
        routes = iter(self._all_routes(src, dst, plane))
        if not self.failed:
            return next(routes)
        return next((r for r in routes if all(self.capacity[k] > 0 for k in r.links)), None)

    def ub_rate_between_nodes(self, src: Place, dst: Place) -> float:
        """What all UB routes between places of two nodes carry together at line rate, in bytes per second.

        Per sub-plane: the least of what the ends send, what the L2 chips that both nodes reach pass on, and what the
        ends receive. As `fabric.cost.line_rate` of the routes, without building them.
        """
        capacity, ends = self.capacity, _ub_ends(src, dst)
        chips = [self.uplink_chip(src.node, i) for i in range(L1_UPLINKS)]
        chips = sorted({*chips} & {self.uplink_chip(dst.node, i) for i in range(L1_UPLINKS)})
        total = 0.0
        for k in range(NUM_SUBPLANES):
            first, last = f"l1:{src.node}.{k}", f"l1:{dst.node}.{k}"
            alive = [(a, b) for a, b in ends if capacity[f"{a}>{first}"] > 0 and capacity[f"{last}>{b}"] > 0]
            sent = sum(capacity[f"{a}>{first}"] for a in {a for a, _ in alive})
            passed = sum(
                min(capacity[f"{first}>l2:{k}.{chip}"], capacity[f"l2:{k}.{chip}>{last}"]) for chip in chips
            )
            total += min(sent, passed, sum(capacity[f"{last}>{b}"] for b in {b for _, b in alive}))
        return total

    def _all_routes(self, src: Place, dst: Place, plane: Plane) -> Iterable[Route]:
        self.check(src)
        self.check(dst)
        if src == dst or set(src.dies) & set(dst.dies):
            raise FabricError(f"{src} and {dst} are the same place: nothing would cross the fabric")
        if plane == "vpc":
            cards = (
                [f"vpc:{src.node}", "vpc", f"vpc:{dst.node}"] if src.node != dst.node else [f"vpc:{src.node}"]
            )
            return [Route((str(src), *cards, str(dst)))]
        if plane == "roce":
            return [
                Route((f"nic:{a}", "roce", f"nic:{b}"))
                for a, b in zip(_cards(src), _cards(dst), strict=False)
            ]
        if src.dies and dst.dies and src.dies[0] // DIES_PER_NPU == dst.dies[0] // DIES_PER_NPU:
            return [Route((str(src), str(dst)))]
        return self._ub_routes(src, dst)

    def _ub_routes(self, src: Place, dst: Place) -> Iterator[Route]:
        for a, b in _ub_ends(src, dst):
            for k in range(NUM_SUBPLANES):
                first, last = f"l1:{src.node}.{k}", f"l1:{dst.node}.{k}"
                if src.node == dst.node:
                    yield Route((a, first, b))
                else:
                    up = {self.uplink_chip(src.node, i) for i in range(L1_UPLINKS)}
                    for chip in sorted(up & {self.uplink_chip(dst.node, i) for i in range(L1_UPLINKS)}):
                        yield Route((a, first, f"l2:{k}.{chip}", last, b))

    def _all_links(self) -> Iterator[tuple[str, float]]:
        for die in range(self.num_dies):
            yield f"die:{die}>die:{die ^ 1}", ON_PACKAGE.value
            yield f"nic:{die}>roce", ROCE_DIE.value
            yield f"roce>nic:{die}", ROCE_DIE.value
        for node in range(self.num_nodes):
            yield f"vpc:{node}>vpc", VPC_NODE.value
            yield f"vpc>vpc:{node}", VPC_NODE.value
            for kind in ("npu", "die", "cpu"):
                for i in range(node * PER_NODE[kind], (node + 1) * PER_NODE[kind]):
                    yield f"{kind}:{i}>vpc:{node}", VPC_NODE.value
                    yield f"vpc:{node}>{kind}:{i}", VPC_NODE.value
            for k in range(NUM_SUBPLANES):
                yield from self._subplane_links(node, k)

    def _subplane_links(self, node: int, k: int) -> Iterator[tuple[str, float]]:
        chip = f"l1:{node}.{k}"
        ends = [(f"die:{node * DIES_PER_NODE + i}", UB_LANE.value) for i in range(DIES_PER_NODE)]
        ends += [
            (f"cpu:{node * CPUS_PER_NODE + i}", UB_CPU.value / NUM_SUBPLANES) for i in range(CPUS_PER_NODE)
        ]
        uplinks: dict[str, float] = {}
        for i in range(L1_UPLINKS):
            name = f"l2:{k}.{self.uplink_chip(node, i)}"
            uplinks[name] = uplinks.get(name, 0.0) + UB_LANE.value
        for end, rate in [*ends, *uplinks.items()]:
            yield f"{end}>{chip}", rate
            yield f"{chip}>{end}", rate

    def _dead_links(self, component: str) -> dict[str, float]:
        """The links that a failed component takes along, and how much of each."""
        if component in self.nominal:
            return {component: self.nominal[component]}
        if component.startswith("optic:"):
            return self._optic_links(component)
        if component.startswith(("l1:", "l2:", "nic:")):
            dead = {k: v for k, v in self.nominal.items() if component in k.split(">")}
            if dead:
                return dead
        raise FabricError(
            f"failed component {component!r} does not exist: expected l1:NODE.SUBPLANE, l2:SUBPLANE.CHIP, "
            "optic:NODE.SUBPLANE.MODULE, nic:DIE or a link FROM>TO"
        )

    def _optic_links(self, component: str) -> dict[str, float]:
        parts = component.removeprefix("optic:").split(".")
        limits = (self.num_nodes, NUM_SUBPLANES, L1_UPLINKS // LINKS_PER_OPTIC)
        if len(parts) != 3 or not all(
            p.isdecimal() and int(p) < n for p, n in zip(parts, limits, strict=True)
        ):
            raise FabricError(
                f"failed component {component!r}: optical modules are optic:NODE.SUBPLANE.MODULE with NODE < "
                f"{limits[0]}, SUBPLANE < {limits[1]}, MODULE < {limits[2]}"
            )
        node, k, module = map(int, parts)
        dead: dict[str, float] = {}
        for i in range(module * LINKS_PER_OPTIC, (module + 1) * LINKS_PER_OPTIC):
            chip = f"l2:{k}.{self.uplink_chip(node, i)}"
            for link in (f"l1:{node}.{k}>{chip}", f"{chip}>l1:{node}.{k}"):
                dead[link] = dead.get(link, 0.0) + UB_LANE.value
        return dead


SUPERNODE = Topology()
"""A whole CloudMatrix384 with nothing broken."""


@lru_cache(maxsize=4096)
def parse_place(text: str) -> Place:
    """`npu:I` (0..383), `die:I` (0..767) or `cpu:I` (0..191). Raises `FabricError` naming what is wrong."""
    kind, colon, number = text.partition(":")
    if kind not in PER_NODE or not colon or not (number.isascii() and number.isdecimal()):
        raise FabricError(f"place {text!r}: expected npu:I, die:I or cpu:I with I a whole number from 0")
    place = Place(kind, int(number))
    SUPERNODE.check(place)
    return place


def die_of(node: int, npu: int, die: int) -> Place:
    """The die at a worker's location: node 0..47, NPU 0..7 of the node, die 0..1 of the NPU."""
    if not (0 <= node < MAX_NODES and 0 <= npu < NPUS_PER_NODE and 0 <= die < DIES_PER_NPU):
        raise FabricError(f"location node={node} npu={npu} die={die} is outside the supernode")
    return Place("die", node * DIES_PER_NODE + npu * DIES_PER_NPU + die)


def _cards(place: Place) -> tuple[int, ...]:
    """The dies whose network cards carry a place's RoCE bytes."""
    if place.is_cpu:
        first = place.node * DIES_PER_NODE + place.index % CPUS_PER_NODE * (DIES_PER_NODE // CPUS_PER_NODE)
        return (first, first + 1)
    return place.dies


def _ub_ends(src: Place, dst: Place) -> list[tuple[str, str]]:
    """Pairs of UB attachments that a transfer uses: die by die between packages, the CPU itself otherwise."""
    a = [f"die:{i}" for i in src.dies] or [str(src)]
    b = [f"die:{i}" for i in dst.dies] or [str(dst)]
    count = max(len(a), len(b))
    return [(a[i % len(a)], b[i % len(b)]) for i in range(count)]
