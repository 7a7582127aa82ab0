"""How long each thing takes in the simulation: one small interface, two machines behind it.

`SupernodeMachine` asks the operator model; `app.twin.profile.LiveMachine` asks what was measured on a real
service.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Protocol

from app.twin import deepseek as r1
from app.twin.prefill import pool_bytes_per_s
from app.twin.scenario import Scenario
from app.twin.trace import BLOCK_TOKENS as TRACE_BLOCK_TOKENS
from app.twin.transfers import Shipment
from fabric.cost import path_cost
from fabric.planes import ROCE_DIE, ROCE_EFFICIENCY, UB_CPU, Plane
from fabric.sharing import Flow
from fabric.topology import CPUS_PER_NODE, DIES_PER_NODE, Place
from fabric.trunks import trunk_capacity, trunk_flow

CONTEXT_STEP = 256
"""Decode steps are computed for contexts rounded up to this many tokens and remembered."""
ATTENDED_STEP = 512


class Machine(Protocol):
    """Seconds of what instances do, and how large they are."""

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of one token."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, here and in the trace."""

    @property
    def tokens_per_decode_step(self) -> float:
        """What a sequence gains per step."""

    @property
    def max_step_tokens(self) -> int:
        """Prompt tokens of a prefill step at most."""

    @property
    def fills_steps(self) -> bool:
        """Whether prompts join in a prefill step until it is full."""

    @property
    def joins_gradually(self) -> bool:
        """Whether answers join those of a decode instance a few at a time."""

    @property
    def prefill_kv_tokens(self) -> int:
        """Tokens whose KV a prefill instance holds."""

    @property
    def decode_kv_tokens(self) -> int:
        """Tokens whose KV a decode instance holds."""

    @property
    def shares_cores(self) -> bool:
        """Whether prefill and decode slow one another down; only then are they told of one another."""

    def prefill_s(
        self, num_computed: int, num_cached: int, mean_attended: float, decode_busy: bool = False
    ) -> float:
        """One prefill step of an instance over so many prompt tokens, which attend to `mean_attended` each."""

    def decode_s(self, num_sequences: int, mean_context: float, prefill_busy: bool = False) -> float:
        """One decode step of an instance."""

    def capacity(self) -> Mapping[str, float]:
        """Bytes per second of every link that shipments share, now."""

    def load(self, num_tokens: int, unit: int) -> Shipment:
        """Fetching one prompt's cached KV from the pool into prefill instance `unit`."""

    def handover(self, num_tokens: int, src_npu: int, dst_npu: int) -> Shipment:
        """Moving one prompt's KV between NPUs. Raises `FabricError` when they are cut off."""

    def rewire(self, failed: Collection[str], num_lost_pool_servers: int) -> None:
        """These components of the fabric, and so many of the pool's servers, are out of order from now on."""


@dataclass
class SupernodeMachine:
    """DeepSeek-R1 on the scenario's instances."""

    scenario: Scenario
    kv_bytes_per_token: int = r1.KV_BYTES_PER_TOKEN
    block_tokens: int = TRACE_BLOCK_TOKENS
    shares_cores: bool = False
    fills_steps: bool = True
    joins_gradually: bool = False
    tokens_per_decode_step: float = field(init=False)
    max_step_tokens: int = field(init=False)
    prefill_kv_tokens: int = field(init=False)
    decode_kv_tokens: int = field(init=False)
    _decode_steps: dict[tuple[int, int], float] = field(default_factory=dict)
    _prefill_steps: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scenario = self.scenario
        kv_tokens = scenario.kv_bytes_per_npu / self.kv_bytes_per_token
        self.tokens_per_decode_step = 1 + scenario.mtp_acceptance if scenario.mtp else 1.0
        self.max_step_tokens = int(scenario.tokens_per_npu * scenario.prefill_npus)
        self.prefill_kv_tokens = max(int(kv_tokens * scenario.prefill_npus), 2 * self.max_step_tokens)
        self.decode_kv_tokens = int(kv_tokens * scenario.decode_npus)
        self._load_rate = _load_rate(scenario)
        self._num_lost_pool_servers = 0
        self._always_failed = frozenset(self.scenario.topology.failed)

    def prefill_s(
        self, num_computed: int, num_cached: int, mean_attended: float, decode_busy: bool = False
    ) -> float:
        """One step; cached tokens count towards the batch and shorten it by the reuse law."""
        assert not decode_busy, "instances of a supernode have cores of their own"
        tokens = num_computed + num_cached
        # A step of few tokens costs nearly as much as one a little larger: sizes are rounded to 2 % and
        # remembered.
        size = max(1, round(tokens / max(64, tokens // 50))) * max(64, tokens // 50)
        reuse = round(100 * num_cached / tokens)
        key = (size, reuse, ceil(mean_attended / ATTENDED_STEP))
        if key not in self._prefill_steps:
            point = self.scenario.prefill_point(
                size / self.scenario.prefill_npus,
                prompt_tokens=2.0 * key[2] * ATTENDED_STEP,
                reuse=reuse / 100,
            )
            # What comes from the pool was waited for before the step.
            self._prefill_steps[key] = point.batch_s() - point.load_s()
        return self._prefill_steps[key]

    def decode_s(self, num_sequences: int, mean_context: float, prefill_busy: bool = False) -> float:
        """One step; the rank with most sequences sets the pace."""
        assert not prefill_busy, "instances of a supernode have cores of their own"
        ranks = self.scenario.decode_npus * self.scenario.machine.ranks_per_device
        key = (ceil(num_sequences / ranks), ceil(mean_context / CONTEXT_STEP))
        if key not in self._decode_steps:
            batch = key[0] * self.scenario.machine.ranks_per_device
            self._decode_steps[key] = self.scenario.decode_point(batch, key[1] * CONTEXT_STEP).step_s()
        return self._decode_steps[key]

    def capacity(self) -> dict[str, float]:
        """Trunks of the fabric, what the pool's servers send together, and what each instance takes from them."""
        scenario = self.scenario
        servers = scenario.topology.num_nodes - self._num_lost_pool_servers
        capacity = {**trunk_capacity(scenario.topology), "pool>": servers * _server_rate(scenario.wire)}
        for unit in range(scenario.prefill_instances + scenario.decode_instances):
            capacity[f"pool>unit:{unit}"] = self._load_rate
        return capacity

    def load(self, num_tokens: int, unit: int) -> Shipment:
        """All NPUs of the instance read their parts at once, from the DRAM of all nodes."""
        num_bytes = num_tokens * self.kv_bytes_per_token
        return Shipment(0.0, Flow(("pool>", f"pool>unit:{unit}"), num_bytes, 1.0, self._load_rate))

    def handover(self, num_tokens: int, src_npu: int, dst_npu: int) -> Shipment:
        """Over the RDMA plane as in the paper, or over UB."""
        topology = self.scenario.topology
        src, dst = Place("npu", src_npu), Place("npu", dst_npu)
        plane: Plane = "ub" if self.scenario.handover_plane == "ub" else "roce"
        startup_s = path_cost(src, dst, plane, None, topology).startup_s
        return Shipment(
            startup_s, trunk_flow(src, dst, num_tokens * self.kv_bytes_per_token, plane, topology)
        )

    def rewire(self, failed: Collection[str], num_lost_pool_servers: int) -> None:
        """Steps and transfers that begin from now on go around what is broken."""
        self._num_lost_pool_servers = num_lost_pool_servers
        names = sorted(self._always_failed | set(failed))
        self.scenario = replace(self.scenario, failed=",".join(names))
        self._load_rate = _load_rate(self.scenario)
        self._decode_steps.clear()
        self._prefill_steps.clear()


def _load_rate(scenario: Scenario) -> float:
    """Bytes per second that one instance reads from the pool."""
    point = scenario.prefill_point()
    ranks = scenario.prefill_npus * scenario.machine.ranks_per_device
    return ranks * pool_bytes_per_s(point.plane, point.fabric_share, scenario.machine)


def _server_rate(plane: str) -> float:
    """Bytes per second that one node's DRAM gives the pool: its CPUs on UB, its network cards on RoCE."""
    if plane == "ub":
        return CPUS_PER_NODE * UB_CPU.value
    return DIES_PER_NODE * ROCE_DIE.value * ROCE_EFFICIENCY.value
