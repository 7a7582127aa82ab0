"""What `twin calibrate` learned of a live service on this machine, and the machine that the simulator makes
of it.

Every time is a sum of a fixed part and parts per token, per sequence and per attended token, as in
`engine.step_time`; all were measured through HTTP on the running service. When prefill and decode workers
share cores, each slows the other down by a measured factor.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from app.twin.errors import TwinError
from app.twin.transfers import Shipment


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured times, in seconds, of one prefill and one decode worker of a service."""

    model: str
    num_prefill: int
    num_decode: int
    block_tokens: int
    kv_bytes_per_token: int
    max_step_tokens: int
    prefill_kv_tokens: int
    decode_kv_tokens: int
    request_fixed_s: float
    """Of a request's TTFT, what is not prefill."""
    prefill_step_s: float
    prefill_token_s: float
    prefill_attended_s: float
    cached_token_s: float
    """Per prompt token whose KV was found instead of computed."""
    tokens_per_decode_step: float
    """Above 1 when the engine speculates."""
    decode_fixed_s: float
    decode_sequence_s: float
    decode_attended_s: float
    handover_s: float
    """From the first token to the moment the sequence takes part in decode steps."""
    prefill_slowdown: float
    """Prefill while decode runs over prefill alone."""
    decode_slowdown: float
    fit_error: float
    """Mean relative error of the fit on the requests it was made from."""
    num_samples: int
    load_error: float | None = None
    """Of the fit to a load: mean |log| of simulated over measured TTFT and TPOT; None without a load."""
    load_samples: int = 0
    alone_samples: int = 0
    """Of them, those that had the service to themselves."""

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """A profile from its JSON file. Raises `TwinError` naming the file and what is wrong."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise TwinError(f"profile {path}: {error}; write one with `cloudmatrix twin calibrate`") from None

    def write(self, path: Path) -> None:
        """Store as JSON. Raises `TwinError` when the file cannot be written."""
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        except OSError as error:
            raise TwinError(f"profile {path}: {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """All values by name."""
        return asdict(self)


@dataclass(frozen=True)
class LiveMachine:
    """The service as the simulator sees it."""

    profile: Profile
    shares_cores: bool = True

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the served model."""
        return self.profile.kv_bytes_per_token

    @property
    def block_tokens(self) -> int:
        """Of the workers' caches."""
        return self.profile.block_tokens

    @property
    def tokens_per_decode_step(self) -> float:
        """What a sequence gains per step."""
        return self.profile.tokens_per_decode_step

    @property
    def max_step_tokens(self) -> int:
        """Prefill rows of a step."""
        return self.profile.max_step_tokens

    @property
    def fills_steps(self) -> bool:
        """A prefill worker's steps end with rows enough."""
        return False

    @property
    def joins_gradually(self) -> bool:
        """A decode worker's answers do."""
        return True

    @property
    def prefill_kv_tokens(self) -> int:
        """Tokens that a prefill worker's cache holds."""
        return self.profile.prefill_kv_tokens

    @property
    def decode_kv_tokens(self) -> int:
        """Tokens that a decode worker's cache holds."""
        return self.profile.decode_kv_tokens

    def prefill_s(
        self, num_computed: int, num_cached: int, mean_attended: float, decode_busy: bool = False
    ) -> float:
        """One prefill step; the fixed part of a request is not in it."""
        known = self.profile
        seconds = known.prefill_step_s + num_computed * (
            known.prefill_token_s + mean_attended * known.prefill_attended_s
        )
        return (seconds + num_cached * known.cached_token_s) * (
            known.prefill_slowdown if decode_busy else 1.0
        )

    def decode_s(self, num_sequences: int, mean_context: float, prefill_busy: bool = False) -> float:
        """One decode step."""
        known = self.profile
        per_sequence = known.decode_sequence_s + mean_context * known.decode_attended_s
        return (known.decode_fixed_s + num_sequences * per_sequence) * (
            known.decode_slowdown if prefill_busy else 1.0
        )

    def capacity(self) -> dict[str, float]:
        """The measured times are of whole transfers; which links they share is not known."""
        return {}

    def load(self, num_tokens: int, unit: int) -> Shipment:
        """Part of `prefill_s`: the measurement does not tell them apart."""
        assert num_tokens >= 0
        assert unit >= 0
        return Shipment(0.0)

    def handover(self, num_tokens: int, src_npu: int, dst_npu: int) -> Shipment:
        """From the first token to the moment the sequence takes part in decode steps."""
        assert num_tokens >= 0
        assert src_npu != dst_npu
        return Shipment(self.profile.handover_s)

    def rewire(self, failed: Collection[str], num_lost_pool_servers: int) -> None:
        """Raises `TwinError` if links are to break: this machine has none of the supernode's."""
        assert num_lost_pool_servers >= 0
        if failed:
            raise TwinError(
                f"faults: {min(failed)} is a part of the supernode, not of this machine's service"
            )
