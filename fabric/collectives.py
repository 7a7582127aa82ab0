"""Operators that many ranks run together: MoE dispatch and combine, all-gather, all-to-all.

Dispatch and combine follow the latencies measured with 128 tokens per rank (paper v3, Table 6), interpolated
in log2 of the EP degree; beyond 256 ranks the last value holds, since 128 to 256 is flat in both columns.
Their payload on the wire would take only 40 and 75 us of UB: the operator, not the link, sets the time. With
fewer tokens a part `fixed_share` of the operator does not shrink. On a narrower plane the link may take over.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import Literal

from fabric.planes import (
    AIV_DIRECT_STARTUP,
    ROCE_DIE,
    ROCE_EFFICIENCY,
    ROCE_LATENCY,
    SDMA_STARTUP,
    UB_TABLE,
    Plane,
)
from fabric.topology import DIES_PER_NODE, FabricError

MoEOperator = Literal["dispatch", "combine"]
Library = Literal["cann", "deepep"]
"""`cann`: CANN EP on CloudMatrix384; `deepep`: DeepEP on H800, RDMA between nodes."""

TABLE_TOKENS = 128
"""Tokens per rank of the measurements."""
EP_DEGREES = (8, 32, 128, 256)
LATENCY_S: dict[tuple[Library, MoEOperator], tuple[float, ...]] = {
    ("cann", "dispatch"): (116e-6, 133e-6, 152e-6, 152e-6),
    ("cann", "combine"): (118e-6, 146e-6, 150e-6, 149e-6),
    ("deepep", "dispatch"): (163e-6, 182e-6, 192e-6, 194e-6),
    ("deepep", "combine"): (318e-6, 350e-6, 369e-6, 360e-6),
}
"""Measured seconds by EP degree, in the order of `EP_DEGREES` (paper v3, Table 6)."""

TOP_K = 8
HIDDEN_SIZE = 7168
DISPATCH_BYTES = 7_680
"""INT8 token of 7,168 B and its scale in a 512 B slot (paper v3, section 4.2.1)."""
COMBINE_BYTES = 14_336
"""BF16 token: 7,168 x 2 B."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Seconds of one operator and what bounds it: the `operator` itself or the `link`."""

    seconds: float
    bound: Literal["operator", "link"]


def payload_bytes(
    operator: MoEOperator, num_tokens: float, *, top_k: int = TOP_K, fused: bool = True
) -> float:
    """Bytes that one rank sends for its tokens; the unfused dispatch sends BF16."""
    per_token = DISPATCH_BYTES if operator == "dispatch" and fused else COMBINE_BYTES
    return num_tokens * top_k * per_token


def table_latency_s(operator: MoEOperator, ep: int, library: Library = "cann") -> float:
    """Seconds with 128 tokens per rank, interpolated in log2(ep). Raises `FabricError` for an EP degree below
    2.

    Below 8 the latency of 8 holds, above 256 that of 256.
    """
    if ep < 2:
        raise FabricError(f"ep: {ep} ranks exchange nothing; at least 2 are needed")
    return _interpolate(log2(ep), [log2(x) for x in EP_DEGREES], LATENCY_S[library, operator])


def moe_exchange(
    operator: MoEOperator,
    num_tokens: float,
    ep: int,
    *,
    plane: Plane = "ub",
    library: Library = "cann",
    fused: bool = True,
    fixed_share: float = 0.0,
    bytes_per_s: float | None = None,
) -> Exchange:
    """One dispatch or combine of `num_tokens` tokens on every rank of `ep`.

    Unfused (our model of the baseline that the paper describes, not a measurement): the operator is preceded
    by an all-to-all of metadata, both issued by SDMA and one after the other, and dispatch carries BF16
    tokens. `bytes_per_s` overrides a rank's share of the plane. Raises `FabricError` for a bad EP degree or
    the VPC plane.
    """
    scale = fixed_share + (1 - fixed_share) * num_tokens / TABLE_TOKENS
    operator_s = table_latency_s(operator, ep, library) * scale
    payload = payload_bytes(operator, num_tokens, fused=fused)
    if not fused:
        operator_s *= payload / payload_bytes(operator, num_tokens)
        operator_s += 2 * SDMA_STARTUP.value - AIV_DIRECT_STARTUP.value
        operator_s += all_to_all_s(num_tokens * TOP_K * 8 / ep, ep, plane=plane)
    rate = bytes_per_s if bytes_per_s is not None else rank_bytes_per_s(plane)
    link_s = _latency_s(plane) + payload / rate
    return Exchange(link_s, "link") if link_s > operator_s else Exchange(operator_s, "operator")


def rank_bytes_per_s(plane: Plane) -> float:
    """What one rank (a die) can send to many others: UB writes across nodes, or its RoCE card."""
    if plane == "ub":
        return UB_TABLE["npu", "write", False].bytes_per_s
    if plane == "roce":
        return ROCE_DIE.value * ROCE_EFFICIENCY.value
    raise FabricError("plane: collectives run on ub or roce; the VPC plane carries no NPU memory traffic")


def all_to_all_s(bytes_per_pair: float, num_ranks: int, *, plane: Plane = "ub") -> float:
    """Every rank sends `bytes_per_pair` to every other, all at once; ranks are dies of consecutive NPUs."""
    return _latency_s(plane, num_ranks) + bytes_per_pair * (num_ranks - 1) / rank_bytes_per_s(plane)


def all_gather_s(bytes_per_rank: float, num_ranks: int, *, plane: Plane = "ub") -> float:
    """Every rank ends with the `bytes_per_rank` of all others; each sends its part to all, bound by
    receiving.
    """
    return _latency_s(plane, num_ranks) + bytes_per_rank * (num_ranks - 1) / rank_bytes_per_s(plane)


def _latency_s(plane: Plane, num_ranks: int = DIES_PER_NODE + 1) -> float:
    if plane == "ub":
        return UB_TABLE["npu", "write", num_ranks <= DIES_PER_NODE].latency_s
    return ROCE_LATENCY.value


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    i = bisect_left(xs, x)
    if i == 0:
        return ys[0]
    if i == len(xs):
        return ys[-1]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])
