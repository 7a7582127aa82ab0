"""Trunks: the parallel lanes of a package, a CPU or a node as one link, for simulations of whole hours.

A transfer that is striped evenly over its lanes behaves as one flow over their sum, so a simulation with thousands
of transfers need not share out every lane (`matrixlink.py` does). Names: `npu:I>ub`, `ub>npu:I` and the same for
`cpu:I`; `node:N>l2`, `l2>node:N` for all uplinks of a node's L1 chips; `npu:I>roce`, `roce>npu:I` for a package's two
network cards, at the rate that RDMA reaches on them.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from fabric.cost import path_cost
from fabric.planes import ROCE_EFFICIENCY, Plane
from fabric.sharing import Flow
from fabric.topology import DIES_PER_NPU, SUPERNODE, Place, Topology


@lru_cache(maxsize=8)
def trunk_capacity(topology: Topology = SUPERNODE) -> Mapping[str, float]:
    """Bytes per second that every trunk has left, failures deducted."""
    capacity: dict[str, float] = {}
    for link, rate in topology.capacity.items():
        start, end = link.split(">")
        trunk = _trunk(start, end)
        if trunk is not None:
            share = ROCE_EFFICIENCY.value if "roce" in (start, end) else 1.0
            capacity[trunk] = capacity.get(trunk, 0.0) + share * rate
    return MappingProxyType(capacity)


def trunk_flow(
    src: Place, dst: Place, num_bytes: float, plane: Plane = "ub", topology: Topology = SUPERNODE
) -> Flow:
    """A transfer as one flow over trunks, no faster than `cost.transfer_time` lets it be on an idle plane.

    `plane` is `ub` or `roce`. Raises `FabricError` for impossible places or when no way is left.
    """
    if plane == "roce":
        cost = path_cost(src, dst, "roce", None, topology)
        nodes = topology.routes(src, dst, "roce")[0].nodes
        start, end = (_package(nodes[i]) for i in (0, -1))
        return Flow((f"{start}>roce", f"roce>{end}"), num_bytes, 1.0, cost.bytes_per_s)
    cost = path_cost(src, dst, "ub", None, topology)
    start, end = (str(p) if p.is_cpu else f"npu:{p.dies[0] // DIES_PER_NPU}" for p in (src, dst))
    links: tuple[str, ...] = () if start == end else (f"{start}>ub", f"ub>{end}")
    if src.node != dst.node:
        links += (f"node:{src.node}>l2", f"l2>node:{dst.node}")
    return Flow(links, num_bytes, 1.0, cost.bytes_per_s)


def _trunk(start: str, end: str) -> str | None:
    """The trunk that a link belongs to; None for links inside a package and those of the VPC plane."""
    if start.startswith("l1:") and end.startswith("l2:"):
        return f"node:{_node(start)}>l2"
    if start.startswith("l2:") and end.startswith("l1:"):
        return f"l2>node:{_node(end)}"
    if end == "roce":
        return f"{_package(start)}>roce"
    if start == "roce":
        return f"roce>{_package(end)}"
    if end.startswith("l1:"):
        return f"{_package(start)}>ub"
    if start.startswith("l1:"):
        return f"ub>{_package(end)}"
    return None


def _node(chip: str) -> str:
    return chip.removeprefix("l1:").partition(".")[0]


def _package(end: str) -> str:
    kind, _, number = end.partition(":")
    return end if kind == "cpu" else f"npu:{int(number) // DIES_PER_NPU}"
