"""Seconds of a decode step of DeepSeek-R1, from rooflines of its operators.

A layer has two streams: attention (projections and MLA) and MoE (dispatch, experts, combine). Serial
execution runs one after the other on all cores; with two microbatches the streams run side by side on a split
of the cores, and the best split is taken. On GPUs, whose decode exchange takes no cores, both microbatches
compute one after the other on all cores and each one's exchange hides behind the other's compute. Compute and
memory overlap imperfectly, as the root of the sum of squares, so an operator near the roofline's ridge is
slower than either bound.
"""

from dataclasses import dataclass
from math import hypot

from app.twin import deepseek as r1
from app.twin.exchange import exchange_s
from app.twin.hardware import ASCEND_910C, Hardware
from app.twin.parameters import PUBLISHED, Parameters
from fabric.planes import Plane

GRAPH_LAUNCH_S = 0.7e-3
"""One graph: 0.6 to 0.8 ms (arXiv 2506.12708 v3, section 4.2.4)."""
MTP_ACCEPTANCE = 0.7
"""The share of speculative tokens kept that the paper assumes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Seconds of one layer. The streams' seconds and cores are those of one microbatch; None when serial."""

    seconds: float
    attention_s: float | None = None
    moe_s: float | None = None
    attention_cores: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePoint:
    """A decode batch in steady state. `batch_per_rank`: sequences; `context_tokens`: mean KV length.

    `fabric_share`: share of UB lanes between nodes that work.
    """

    batch_per_rank: float
    context_tokens: float
    ep: int = 320
    plane: Plane = "ub"
    mtp: bool = True
    microbatch: bool = True
    imbalanced: bool = True
    fabric_share: float = 1.0
    hardware: Hardware = ASCEND_910C
    parameters: Parameters = PUBLISHED

    @property
    def query_tokens(self) -> int:
        """Tokens that a sequence brings to a step."""
        return 2 if self.mtp else 1

    def layer(self) -> Layer:
        """One MoE layer; microbatching is used only when it is faster."""
        pass_s = self.parameters.decode_pass_s
        cores = self.hardware.num_cores
        sequences = self.batch_per_rank
        attention_s = self._attention_s(sequences, 1.0)
        best = Layer(attention_s + self._moe_s(sequences, 1.0, in_pipeline=False) + pass_s)
        if not self.microbatch:
            return best
        if not self.hardware.exchange_needs_cores:
            compute_s = self._attention_s(sequences / 2, 1.0) + self._experts_s(sequences / 2, 1.0)
            seconds = 2 * (max(compute_s, self._sent_s(sequences / 2, in_pipeline=True)) + pass_s)
            return min(best, Layer(seconds), key=lambda layer: layer.seconds)
        for given in range(1, cores):
            attention_s = self._attention_s(sequences / 2, given / cores) + pass_s
            moe_s = self._moe_s(sequences / 2, 1 - given / cores, in_pipeline=True) + pass_s
            seconds = 2 * max(attention_s, moe_s)
            if seconds < best.seconds:
                best = Layer(seconds, attention_s, moe_s, given)
        return best

    def step_s(self) -> float:
        """All layers, the LM head of each graph and its launch."""
        graphs = 2 if self.mtp else 1
        layers = r1.NUM_LAYERS + (1 if self.mtp else 0)
        head_s = 2 * r1.LM_HEAD_PARAMETERS / self._memory_rate
        return layers * self.layer().seconds + graphs * (head_s + GRAPH_LAUNCH_S)

    def tokens_per_step(self, acceptance: float = MTP_ACCEPTANCE) -> float:
        """Tokens that a sequence gains per step."""
        return 1 + acceptance if self.mtp else 1.0

    def tpot_s(self, acceptance: float = MTP_ACCEPTANCE) -> float:
        """Seconds per output token of one sequence."""
        return self.step_s() / self.tokens_per_step(acceptance)

    @property
    def _memory_rate(self) -> float:
        return self.hardware.memory_efficiency * self.hardware.hbm_bytes_per_s

    @property
    def _gemm_rate(self) -> float:
        return self.hardware.gemm_efficiency * self.hardware.dense_8bit_flops

    def _attention_s(self, sequences: float, cores_share: float) -> float:
        inflation, tokens = self.parameters.decode_inflation, sequences * self.query_tokens
        weights_s = r1.ATTENTION_PARAMETERS / self._memory_rate
        gemm_s = 2 * r1.ATTENTION_PARAMETERS * tokens / (self._gemm_rate * cores_share)
        kv_s = sequences * self.context_tokens * r1.KV_BYTES_PER_TOKEN_LAYER / self._memory_rate
        flops = r1.DECODE_ATTENTION_FLOPS * self.context_tokens * tokens
        mla_rate = self.hardware.mla_compute_efficiency * self.hardware.dense_16bit_flops * cores_share
        return hypot(weights_s, inflation * gemm_s) + inflation * hypot(kv_s, flops / mla_rate)

    def _moe_s(self, sequences: float, cores_share: float, *, in_pipeline: bool) -> float:
        return self._sent_s(sequences, in_pipeline=in_pipeline) + self._experts_s(sequences, cores_share)

    def _sent_s(self, sequences: float, *, in_pipeline: bool) -> float:
        return exchange_s(
            sequences * self.query_tokens,
            self.ep,
            self.hardware,
            self.parameters,
            plane=self.plane,
            imbalance=self._imbalance,
            inflation=self.parameters.decode_inflation,
            in_pipeline=in_pipeline,
            fabric_share=self.fabric_share,
        )

    def _experts_s(self, sequences: float, cores_share: float) -> float:
        rows = sequences * self.query_tokens * r1.EXPERTS_PER_TOKEN * self._imbalance
        weights_s = r1.experts_per_rank(self.ep) * r1.EXPERT_PARAMETERS / self._memory_rate
        gemm_s = 2 * r1.EXPERT_PARAMETERS * rows / (self._gemm_rate * cores_share)
        return hypot(weights_s, self.parameters.decode_inflation * gemm_s)

    @property
    def _imbalance(self) -> float:
        return self.parameters.imbalance if self.imbalanced else 1.0
