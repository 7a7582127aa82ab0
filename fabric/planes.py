"""The figures of CloudMatrix384's planes and transfer engines, each with its source and grade.

Sources: "paper v2" and "paper v3" are Serving Large Language Models on Huawei CloudMatrix384, arXiv
2506.12708, whose second version still printed link rates; "press" is the article of QbitAI on that paper;
"StrataCL" is arXiv 2607.26444, "UBEP" is arXiv 2607.06202, both measured on the same machine. Rates are
decimal bytes per second in one direction.
"""

from dataclasses import dataclass
from typing import Literal

Plane = Literal["ub", "roce", "vpc"]
"""`ub`: Unified Bus, NPUs and CPUs; `roce`: RDMA scale-out, NPUs only; `vpc`: Ethernet through each node's
DPU.
"""

Operation = Literal["read", "write"]
Engine = Literal["direct", "aiv_direct", "sdma"]
"""Who issues a UB transfer. `direct`: the memory access that the published table measures, nothing added."""

Grade = Literal["quoted", "derived", "assumed", "press"]
"""`quoted` from the paper; `derived` from quoted figures; `assumed`: one secondary source or an estimate;
`press`.
"""

GB = 1e9


@dataclass(frozen=True, slots=True)
class Figure:
    """A number somebody published or we chose, and why it may be believed."""

    value: float
    unit: str
    source: str
    grade: Grade


@dataclass(frozen=True, slots=True)
class UBPath:
    """One row and side of the published UB table: bytes/s of a die and the latency of a 512-byte access."""

    bytes_per_s: float
    latency_s: float


TRANSCEIVERS_PER_DIE = 7
"""One per sub-plane (paper v2, section 3.3.1)."""
UB_LANE = Figure(28 * GB, "B/s", "224 Gbps per transceiver, paper v2", "quoted")
UB_CPU = Figure(160 * GB, "B/s", "one CPU, one way, paper v2", "quoted")
ON_PACKAGE = Figure(270 * GB, "B/s", "die to die on the package, one way, paper v2", "quoted")
ROCE_DIE = Figure(25 * GB, "B/s", "200 Gbps per die, paper v2", "quoted")
VPC_NODE = Figure(50 * GB, "B/s", "400 Gbps per node through the Qingtian card, paper v2", "quoted")

UB_TABLE_SOURCE = "UB bandwidth and 512 B latency, paper v2 Table 1 (per die, one direction)"
UB_TABLE: dict[tuple[str, Operation, bool], UBPath] = {
    ("npu", "read", False): UBPath(164 * GB, 1.9e-6),
    ("npu", "read", True): UBPath(167 * GB, 1.2e-6),
    ("npu", "write", False): UBPath(135 * GB, 2.1e-6),
    ("npu", "write", True): UBPath(137 * GB, 1.3e-6),
    ("cpu", "read", False): UBPath(147 * GB, 1.7e-6),
    ("cpu", "read", True): UBPath(151 * GB, 1.0e-6),
    ("cpu", "write", False): UBPath(107 * GB, 1.9e-6),
    ("cpu", "write", True): UBPath(110 * GB, 1.1e-6),
}
"""By (NPU-to-NPU or NPU-to-CPU, operation, inside one node)."""
UB_TABLE_BYTES = 512
"""Access size of the table's latencies."""

ON_PACKAGE_PATH = UBPath(210 * GB, 0.2e-6)
"""Die to die, measured by StrataCL (assumed: one source; UBEP gives 218 ns)."""

ROCE_EFFICIENCY = Figure(
    0.85, "", "DeepEP reaches 78 to 92 % of its NIC's line rate on H800 (its README)", "assumed"
)
ROCE_LATENCY = Figure(
    5e-6, "s", "small one-sided RDMA through two switch tiers, order of magnitude", "assumed"
)
VPC_LATENCY = Figure(30e-6, "s", "TCP/IP through a DPU, order of magnitude", "assumed")

SDMA_STARTUP = Figure(10e-6, "s", "about 10 us", "press")
AIV_DIRECT_STARTUP = Figure(1e-6, "s", "under 1 us", "press")
ENGINE_STARTUP_S: dict[Engine, float] = {
    "direct": 0.0,
    "aiv_direct": AIV_DIRECT_STARTUP.value,
    "sdma": SDMA_STARTUP.value,
}
