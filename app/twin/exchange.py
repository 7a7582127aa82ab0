"""MoE dispatch and combine for the twin: one measured level, the rest from how the operators work.

In FusedDispatch and FusedCombine (arXiv 2506.12708 v3, section 4.2.1) vector cores send token by token
straight into remote memory. A core's loop waits for its remote writes, so a share of writes that leaves the
node costs the published difference of write latencies, 2.1 against 1.3 us (v2, Table 1). About half of the 48
vector cores saturate a die's link (UBEP arXiv 2607.06202, StrataCL arXiv 2607.26444), hence 24 senders;
inside the microbatch pipeline the MoE stream has only 16. Waiting at the barrier is about 15 % of the
operator (UBEP) and does not shrink with fewer tokens. Combine makes as many sends as dispatch and is given
the same time.
"""

from app.twin.hardware import Hardware
from app.twin.parameters import Parameters
from fabric.collectives import COMBINE_BYTES, DISPATCH_BYTES, TABLE_TOKENS, TOP_K, table_latency_s
from fabric.planes import ROCE_EFFICIENCY, UB_TABLE, Plane
from fabric.topology import DIES_PER_NODE

SATURATING_CORES = 24
PIPELINE_CORES = 16
BARRIER_SHARE = 0.15
LEVEL_EP = 256


def crossing_share(ep: int) -> float:
    """Share of a rank's sends that leaves its node, with experts spread evenly over `ep` dies."""
    return max(0.0, 1 - DIES_PER_NODE / ep)


def operator_s(ep: int, hardware: Hardware, parameters: Parameters, operator: str = "dispatch") -> float:
    """Seconds of one operator with 128 tokens per rank on the hardware's own network."""
    if hardware.exchange_library == "deepep":
        return table_latency_s("combine" if operator == "combine" else "dispatch", ep, "deepep")
    waits = TABLE_TOKENS * TOP_K / SATURATING_CORES
    write_far, write_near = (UB_TABLE["npu", "write", inside].latency_s for inside in (False, True))
    crossing = crossing_share(ep) - crossing_share(LEVEL_EP)
    return parameters.dispatch_ep256_s + waits * (write_far - write_near) * crossing


def exchange_s(
    num_tokens: float,
    ep: int,
    hardware: Hardware,
    parameters: Parameters,
    *,
    plane: Plane,
    imbalance: float,
    inflation: float,
    in_pipeline: bool,
    fabric_share: float = 1.0,
) -> float:
    """Dispatch and combine of `num_tokens` tokens per rank, one after the other.

    The plane's rate bounds each operator from below: RoCE's card does so at once, UB only when few lanes are
    left (`fabric_share` of them).
    """
    total = 0.0
    slowdown = (
        SATURATING_CORES / PIPELINE_CORES if in_pipeline and hardware.exchange_library == "cann" else 1.0
    )
    for operator, token_bytes in (("dispatch", DISPATCH_BYTES), ("combine", COMBINE_BYTES)):
        full_s = operator_s(ep, hardware, parameters, operator)
        moving_s = (1 - BARRIER_SHARE) * full_s * num_tokens / TABLE_TOKENS * imbalance * inflation * slowdown
        if hardware.exchange_library == "cann":
            wire_bytes = num_tokens * TOP_K * token_bytes * imbalance
            moving_s = max(moving_s, wire_bytes / _wire_rate(plane, hardware, fabric_share))
        total += BARRIER_SHARE * full_s * slowdown + moving_s
    return total


def _wire_rate(plane: Plane, hardware: Hardware, fabric_share: float) -> float:
    if plane == "roce":
        return hardware.nic_bytes_per_s * ROCE_EFFICIENCY.value
    return UB_TABLE["npu", "write", False].bytes_per_s * max(fabric_share, 1e-9)
