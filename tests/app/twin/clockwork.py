"""A machine of round numbers for simulations that are worked out by hand."""

from collections.abc import Collection
from dataclasses import dataclass, field

from app.twin.fleet import Deployment
from app.twin.transfers import Shipment
from fabric.sharing import Flow


@dataclass
class ClockworkMachine:
    """A prompt token takes 1 ms, a decode step `step_s` and `sequence_s` for each sequence in it, a handover
    0.25 s, a cached token nothing.

    With `wire_bytes_per_s`, handovers of 1 byte per token share one wire instead.
    """

    shares_cores: bool = False
    fills_steps: bool = True
    joins_gradually: bool = False
    step_s: float = 1.0
    sequence_s: float = 0.0
    wire_bytes_per_s: float | None = None
    failed: set[str] = field(default_factory=set)
    kv_bytes_per_token: int = 1
    block_tokens: int = 4
    tokens_per_decode_step: float = 1.0
    max_step_tokens: int = 1000
    prefill_kv_tokens: int = 4000
    decode_kv_tokens: int = 4000

    def prefill_s(
        self, num_computed: int, num_cached: int, mean_attended: float, decode_busy: bool = False
    ) -> float:
        return num_computed * 1e-3

    def decode_s(self, num_sequences: int, mean_context: float, prefill_busy: bool = False) -> float:
        return (self.step_s + num_sequences * self.sequence_s) * (2 if prefill_busy else 1)

    def capacity(self) -> dict[str, float]:
        if self.wire_bytes_per_s is None:
            return {}
        return {"wire": self.wire_bytes_per_s * (0.5 if "half" in self.failed else 1.0)}

    def load(self, num_tokens: int, unit: int) -> Shipment:
        return Shipment(0.0)

    def handover(self, num_tokens: int, src_npu: int, dst_npu: int) -> Shipment:
        if self.wire_bytes_per_s is None:
            return Shipment(0.25)
        return Shipment(0.0, Flow(("wire",), num_tokens, 1.0, self.wire_bytes_per_s))

    def rewire(self, failed: Collection[str], num_lost_pool_servers: int) -> None:
        self.failed = set(failed)


def spec(**changes: object) -> Deployment:
    given: dict[str, object] = {
        "prefill_instances": 1,
        "decode_instances": 1,
        "max_running_per_decode": 100,
        "prefill_npus": 1,
        "decode_npus": 1,
    }
    return Deployment(**(given | changes))  # type: ignore[arg-type]  # by test table
