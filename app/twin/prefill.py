"""Seconds of a prefill batch of DeepSeek-R1.

Compute (projections, causal attention, experts) and bulk communication (dispatch and combine over the plane)
add up serially; with microbatches communication hides behind compute, and only what is longer shows.
Communication runs on SDMA at the rate that UB writes reach between nodes. What the context cache holds is
loaded from the pool first and shortens the batch by a linear law: the time lost does not go to zero with the
tokens.
"""

from dataclasses import dataclass

from app.twin import deepseek as r1
from app.twin.hardware import ASCEND_910C, Hardware
from app.twin.parameters import PUBLISHED, Parameters
from fabric.collectives import COMBINE_BYTES, DISPATCH_BYTES, TOP_K
from fabric.planes import (
    ROCE_EFFICIENCY,
    TRANSCEIVERS_PER_DIE,
    UB_CPU,
    UB_LANE,
    UB_TABLE,
    VPC_NODE,
    Plane,
)
from fabric.topology import CPUS_PER_NODE, NPUS_PER_NODE

GPUS_PER_NODE = 8
ROUTING_NODES = 4
"""Nodes among which DeepSeek-V3 and R1 choose a token's experts (their node-limited routing)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoint:
    """A prefill batch. `tokens_per_rank`: prompt tokens, cached ones included; `reuse`: their cached share."""

    tokens_per_rank: float
    prompt_tokens: float
    ep: int = 32
    plane: Plane = "ub"
    microbatch: bool = True
    imbalanced: bool = True
    fabric_share: float = 1.0
    reuse: float = 0.0
    hardware: Hardware = ASCEND_910C
    parameters: Parameters = PUBLISHED

    def compute_s(self) -> float:
        """Matrix work of one layer, with the weights read once."""
        hardware, parameters, tokens = self.hardware, self.parameters, self.tokens_per_rank
        imbalance = parameters.imbalance if self.imbalanced else 1.0
        given = 1 - hardware.prefill_exchange_cores / hardware.num_cores if self.microbatch else 1.0
        gemm_rate = hardware.gemm_efficiency * hardware.dense_8bit_flops * given
        mla_rate = hardware.mla_compute_efficiency * hardware.dense_16bit_flops * given
        projection_s = 2 * r1.ATTENTION_PARAMETERS * tokens / gemm_rate
        attention_s = r1.PREFILL_ATTENTION_FLOPS * tokens * self.prompt_tokens / 2 / mla_rate
        rows = tokens * r1.EXPERTS_PER_TOKEN * imbalance
        experts_s = 2 * r1.EXPERT_PARAMETERS * rows / gemm_rate
        weight_bytes = r1.ATTENTION_PARAMETERS + r1.experts_per_rank(self.ep) * r1.EXPERT_PARAMETERS
        floor_s = weight_bytes / (hardware.memory_efficiency * hardware.hbm_bytes_per_s)
        return max(floor_s, parameters.prefill_inflation * (projection_s + attention_s + experts_s))

    def exchange_s(self) -> float:
        """Dispatch and combine of one layer, on the wire of the busiest rank."""
        imbalance = self.parameters.imbalance if self.imbalanced else 1.0
        token_bytes = self.tokens_per_rank * (DISPATCH_BYTES + COMBINE_BYTES) * imbalance
        if self.hardware.exchange_library == "deepep":
            sends = remote_nodes_per_token(self.ep)
            return token_bytes * sends / (self.hardware.nic_bytes_per_s * ROCE_EFFICIENCY.value)
        num_bytes = token_bytes * TOP_K
        if self.plane == "roce":
            return num_bytes / (self.hardware.nic_bytes_per_s * ROCE_EFFICIENCY.value)
        return num_bytes / (UB_TABLE["npu", "write", False].bytes_per_s * max(self.fabric_share, 1e-9))

    def layer_s(self) -> float:
        """One layer without reuse."""
        compute_s, exchange_s = self.compute_s(), self.exchange_s()
        return max(compute_s, exchange_s) if self.microbatch else compute_s + exchange_s

    def load_s(self) -> float:
        """Reading the cached part from the pool when all ranks do so at once."""
        num_bytes = self.tokens_per_rank * self.reuse * r1.KV_BYTES_PER_TOKEN
        return num_bytes / pool_bytes_per_s(self.plane, self.fabric_share, self.hardware)

    def batch_s(self) -> float:
        """The whole batch: the time to first token of prompts that start together."""
        without_reuse_s = r1.NUM_LAYERS * self.layer_s()
        return without_reuse_s * (1 - self.parameters.reuse_gain * self.reuse) + self.load_s()


def remote_nodes_per_token(ep: int) -> float:
    """Nodes other than its own that a token is sent to by DeepEP's prefill kernels, over RDMA once each.

    Its 8 experts lie on 4 nodes at most (DeepSeek-V3's group-limited routing); inside a node NVLink forwards.
    """
    nodes = max(1.0, ep / GPUS_PER_NODE)
    groups = min(nodes, ROUTING_NODES)
    reached = groups * (1 - (1 - 1 / groups) ** TOP_K)
    return reached * (1 - 1 / nodes)


def pool_bytes_per_s(plane: Plane, fabric_share: float = 1.0, hardware: Hardware = ASCEND_910C) -> float:
    """A rank's share of the pool's bandwidth when every rank reads: CPU ports on UB, the rank's card on RoCE."""
    dies = 2 * NPUS_PER_NODE
    if plane == "ub":
        ports = UB_CPU.value * CPUS_PER_NODE / dies
        lanes = UB_LANE.value * TRANSCEIVERS_PER_DIE * max(fabric_share, 1e-9)
        return min(UB_TABLE["cpu", "read", False].bytes_per_s, ports, lanes)
    if plane == "roce":
        return hardware.nic_bytes_per_s * ROCE_EFFICIENCY.value
    return VPC_NODE.value / dies
