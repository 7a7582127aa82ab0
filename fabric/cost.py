"""How long one transfer takes on an idle plane: `start-up + num_bytes / rate`.

UB follows the table measured on the machine (`planes.UB_TABLE`): the rate is that of a die, a package moves
with both dies, a CPU is bounded by its own 160 GB/s, and the start-up is chosen so that 512 bytes take the
published latency. Failures scale the rate by the share of lanes that survive.

RoCE is the other plane of the same machine, or all that a conventional cluster has between its nodes: 200
Gbps per die at the efficiency that DeepEP reaches. CPUs are not on it, so bytes of the memory pool go through
a network card of the node that owns the DRAM and hop once inside that node, pipelined, which adds the hop's
latency but no time per byte. All RoCE transfers pass the network card, also within a node: the question
answered is what these bytes would cost on that plane.

VPC counts a fair share of the node's 400 Gbps: an eighth for an NPU, a sixteenth for a die, a quarter for a
CPU.
"""

from dataclasses import dataclass
from functools import lru_cache

from fabric.gpu_cluster import GPUCluster
from fabric.planes import (
    ENGINE_STARTUP_S,
    ON_PACKAGE_PATH,
    ROCE_DIE,
    ROCE_EFFICIENCY,
    ROCE_LATENCY,
    UB_CPU,
    UB_LANE,
    UB_TABLE,
    UB_TABLE_BYTES,
    VPC_LATENCY,
    VPC_NODE,
    Engine,
    Operation,
    Plane,
)
from fabric.topology import (
    L1_UPLINKS,
    NUM_SUBPLANES,
    PER_NODE,
    SUPERNODE,
    FabricError,
    Place,
    Route,
    Topology,
    parse_place,
)


@dataclass(frozen=True, slots=True)
class PathCost:
    """An idle path: seconds before the first byte, then bytes per second."""

    startup_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """Time for `num_bytes` to arrive. Raises `FabricError` for a negative size."""
        if num_bytes < 0:
            raise FabricError(f"num_bytes: {num_bytes} is negative")
        return self.startup_s + num_bytes / self.bytes_per_s


def default_operation(src: Place, dst: Place) -> Operation:
    """An NPU reads from host memory or from a peer, and writes to host memory: NPUs start the transfers."""
    return "write" if dst.is_cpu and not src.is_cpu else "read"


@lru_cache(maxsize=65536)
def path_cost(
    src: Place, dst: Place, plane: Plane, op: Operation | None = None, topology: Topology = SUPERNODE
) -> PathCost:
    """The path's start-up and rate. Raises `FabricError` for impossible places or when no way is left."""
    shortest = topology.shortest_route(src, dst, plane)
    if shortest is None:
        raise FabricError(f"no {plane} way from {src} to {dst} is left: too many links or chips have failed")
    if plane == "vpc":
        share = min(VPC_NODE.value / PER_NODE[src.kind], VPC_NODE.value / PER_NODE[dst.kind])
        return PathCost(VPC_LATENCY.value, share)
    if plane == "roce":
        rate = ROCE_DIE.value * ROCE_EFFICIENCY.value * len(topology.routes(src, dst, plane))
        return PathCost(ROCE_LATENCY.value + _host_hops_s(src, dst), rate)
    if len(shortest.nodes) == 2:
        return _from_table(ON_PACKAGE_PATH.latency_s, ON_PACKAGE_PATH.bytes_per_s)
    path = UB_TABLE[
        "cpu" if src.is_cpu or dst.is_cpu else "npu", op or default_operation(src, dst), src.node == dst.node
    ]
    alive = _alive_share(topology, src, dst) if topology.failed else 1.0
    return _from_table(path.latency_s, alive * _nominal_ub_rate(src, dst, path.bytes_per_s))


def transfer_time(
    src: Place,
    dst: Place,
    num_bytes: int,
    plane: Plane = "ub",
    *,
    op: Operation | None = None,
    engine: Engine = "direct",
    topology: Topology = SUPERNODE,
) -> float:
    """Seconds for `num_bytes` from `src` to `dst` on an idle plane.

    `op` says who moves them (default: `default_operation`); `engine` adds a UB engine's start-up, which only
    the press has published. Raises `FabricError` for impossible places, a negative size, or when no way is
    left.
    """
    startup_s = ENGINE_STARTUP_S[engine] if plane == "ub" else 0.0
    return startup_s + path_cost(src, dst, plane, op, topology).seconds(num_bytes)


def line_rate(topology: Topology, routes: list[Route]) -> float:
    """What the links of UB or RoCE routes carry together at line rate, in bytes per second.

    Per sub-plane the routes form three stages in series (ends to L1, over the L2 chips, L1 to ends), so the
    least of the three sums is the exact maximum flow.
    """
    stages: dict[tuple[str, int], dict[tuple[str, ...], float]] = {}
    for route in routes:
        links = route.links
        chip = route.nodes[1]
        for stage, part in enumerate((links[:1], links[1:-1], links[-1:])):
            if part:
                rate = min(topology.capacity[link] for link in part)
                stages.setdefault((chip, stage), {})[part] = rate
    total = 0.0
    for chip in {chip for chip, _ in stages}:
        total += min(sum(stages[chip, s].values()) for s in range(3) if (chip, s) in stages)
    return total


@lru_cache(maxsize=8)
def surviving_share(topology: Topology) -> float:
    """Share of its lanes to the L2 chips that the worst node still has (1 when nothing is broken).

    What runs over many nodes at once, such as an expert exchange, waits for that node.
    """
    if not topology.failed:
        return 1.0
    left = [0.0] * topology.num_nodes
    for link, rate in topology.capacity.items():
        start, end = link.split(">")
        if start.startswith("l1:") and end.startswith("l2:"):
            left[int(start[3:].split(".")[0])] += rate
    return min(left) / (NUM_SUBPLANES * L1_UPLINKS * UB_LANE.value)


def transfer_report(src: str, dst: str, num_bytes: int, topology: Topology = SUPERNODE) -> dict[str, object]:
    """One transfer on all three planes: the JSON object of `cloudmatrix fabric transfer`.

    `ub_s`, `roce_s` and `vpc_s` use rates that such transfers achieve; `line_rate_s` is the floor that the
    links' nominal rates set. `gpu_cluster_s` is the same transfer between GPUs of those numbers on a cluster of
    H800 nodes with RoCE between them; None for other places than NPUs. `basis` grades each. Raises
    `FabricError` for impossible places or a negative size.
    """
    a, b = parse_place(src), parse_place(dst)
    routes = topology.routes(a, b, "ub")
    ub = path_cost(a, b, "ub", None, topology)
    roce = path_cost(a, b, "roce", None, topology)
    vpc = path_cost(a, b, "vpc", None, topology)
    nominal = {
        "ub": line_rate(topology, routes),
        "roce": roce.bytes_per_s / ROCE_EFFICIENCY.value,
        "vpc": vpc.bytes_per_s,
    }
    return {
        "src": str(a),
        "dst": str(b),
        "num_bytes": num_bytes,
        "operation": default_operation(a, b),
        "ub_s": ub.seconds(num_bytes),
        "roce_s": roce.seconds(num_bytes),
        "vpc_s": vpc.seconds(num_bytes),
        "gpu_cluster_s": _gpu_cluster_s(a, b, num_bytes, topology.num_npus),
        "basis": {
            "ub": "measured on the machine, published",
            "roce": f"{ROCE_EFFICIENCY.grade}: efficiency and latency are not published for this machine",
            "vpc": f"{VPC_LATENCY.grade}: only the line rate is published",
            "gpu_cluster": f"{ROCE_EFFICIENCY.grade}: DeepEP's efficiencies on H800",
        },
        "line_rate_s": {plane: num_bytes / rate for plane, rate in nominal.items()},
        "path": list(routes[0].nodes),
        "num_paths": len(routes),
    }


def _gpu_cluster_s(src: Place, dst: Place, num_bytes: int, num_gpus: int) -> float | None:
    if src.kind != "npu" or dst.kind != "npu":
        return None
    return GPUCluster(num_gpus).transfer_time(src.index, dst.index, num_bytes)


def _from_table(latency_s: float, bytes_per_s: float) -> PathCost:
    return PathCost(latency_s - UB_TABLE_BYTES / bytes_per_s, bytes_per_s)


def _nominal_ub_rate(src: Place, dst: Place, die_bytes_per_s: float) -> float:
    """Rate of a healthy UB path: one or two dies' worth, as far as a CPU's port lets it through."""
    if src.is_cpu and dst.is_cpu:
        return min(UB_CPU.value, die_bytes_per_s)
    widths = [len(p.dies) for p in (src, dst) if not p.is_cpu]
    rate = min(widths) * die_bytes_per_s
    return min(rate, UB_CPU.value) if len(widths) == 1 else rate


def _alive_share(topology: Topology, src: Place, dst: Place) -> float:
    """What is left of the line rate that the places have on a healthy machine."""
    healthy = _healthy(topology.num_nodes)
    if src.node != dst.node:
        return topology.ub_rate_between_nodes(src, dst) / healthy.ub_rate_between_nodes(src, dst)
    left = line_rate(topology, topology.routes(src, dst, "ub"))
    return left / line_rate(healthy, healthy.routes(src, dst, "ub"))


@lru_cache(maxsize=8)
def _healthy(num_nodes: int) -> Topology:
    return Topology(num_nodes)


def _host_hops_s(src: Place, dst: Place) -> float:
    """Latency of the hops between a network card and the host memory behind it, one per CPU end."""
    return (src.is_cpu + dst.is_cpu) * UB_TABLE["cpu", "read", True].latency_s
