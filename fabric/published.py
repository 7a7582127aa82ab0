"""The fabric's own answers beside the published figures: `cloudmatrix fabric validate`.

The UB table and the sizes are inputs or rules of the model, so they must come back exactly; the line says which.
"""

from typing import Any

from fabric.cost import path_cost, transfer_time
from fabric.planes import UB_TABLE, UB_TABLE_BYTES, UB_TABLE_SOURCE, Operation
from fabric.topology import SUPERNODE, Place, Topology

KV_4K_BYTES = 4096 * 70_272
"""KV of 4,096 tokens of DeepSeek-R1."""
TABLE_10 = ((384, 56, 1.00), (352, 56, 0.92), (288, 42, 1.00), (256, 42, 0.89), (192, 28, 1.00))
"""(NPUs, logical L2 switches, their use), paper v3, Table 10."""
LINE_RATE_S = {"ub": 0.734e-3, "roce": 5.757e-3, "vpc": 46.05e-3}
"""287.8 MB by hand: 2 dies of 7 x 28 GB/s; 2 cards of 25 GB/s; an eighth of a node's 50 GB/s."""


def validate_fabric() -> dict[str, Any]:
    """The JSON object of `fabric validate`: rows of `what`, `unit`, `published`, `modelled`, `error`, `source`."""
    rows = [row for key in UB_TABLE for row in _ub_rows(*key)]
    rows += [row for size in TABLE_10 for row in _size_rows(*size)]
    npus = Place("npu", 0), Place("npu", 383)
    handover = {plane: transfer_time(*npus, KV_4K_BYTES, plane) for plane in ("ub", "roce", "vpc")}
    return {
        "rows": rows,
        "largest_error": max(abs(row["error"]) for row in rows),
        "handover_4k": {
            "num_bytes": KV_4K_BYTES,
            "modelled_s": handover,
            "line_rate_s": LINE_RATE_S,
            "ub_faster_than": {plane: handover[plane] / handover["ub"] for plane in ("roce", "vpc")},
        },
    }


def _ub_rows(kind: str, operation: Operation, inside: bool) -> list[dict[str, Any]]:
    published = UB_TABLE[kind, operation, inside]
    near, far = Place("die", 0), Place("die", 2 if inside else SUPERNODE.num_dies - 1)
    if kind == "cpu":
        cpu = Place("cpu", 0 if inside else SUPERNODE.num_cpus - 1)
        near, far = (cpu, near) if operation == "read" else (near, cpu)
    cost = path_cost(near, far, "ub", operation)
    ends = f"{kind.upper()} to NPU" if operation == "read" else f"NPU to {kind.upper()}"
    name = f"UB {ends}, {operation}, {'inside a node' if inside else 'between nodes'}"
    return [
        _row(
            f"{name}: {UB_TABLE_BYTES} B", "us", 1e6 * published.latency_s, 1e6 * cost.seconds(UB_TABLE_BYTES)
        ),
        _row(f"{name}: bandwidth", "GB/s", published.bytes_per_s / 1e9, cost.bytes_per_s / 1e9),
    ]


def _size_rows(num_npus: int, switches: int, use: float) -> list[dict[str, Any]]:
    topology, source = Topology.of_npus(num_npus), "arXiv 2506.12708 v3, Table 10"
    return [
        _row(f"{num_npus} NPUs: logical L2 switches", "", switches, topology.num_logical_switches, source),
        _row(f"{num_npus} NPUs: use of the switches", "", use, round(topology.switch_utilisation, 2), source),
    ]


def _row(
    what: str, unit: str, published: float, modelled: float, source: str = UB_TABLE_SOURCE
) -> dict[str, Any]:
    return {
        "what": what,
        "unit": unit,
        "published": published,
        "modelled": modelled,
        "error": modelled / published - 1,
        "source": source,
    }
