"""What to predict: a flat set of keys with defaults, from a JSON or TOML file and `key=value` words.

Every key is checked against what the supernode, the model and the memory allow; a refusal names the key.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.twin import deepseek as r1
from app.twin.decode import MTP_ACCEPTANCE, DecodePoint
from app.twin.errors import TwinError
from app.twin.faults import Fault, parse_faults
from app.twin.hardware import Hardware, profile
from app.twin.parameters import PUBLISHED, Parameters
from app.twin.prefill import PrefillPoint
from fabric.cost import surviving_share
from fabric.planes import Plane
from fabric.topology import FabricError, Topology

MODELS = ("deepseek-r1",)
KV_MEMORY_SHARE = 0.9
"""Share of the memory beside the weights that KV may take."""
CHOICES = {
    "model": MODELS,
    "plane": ("ub", "roce"),
    "phase": ("prefill", "decode"),
    "eplb": ("default", "perfect"),
    "handover_plane": ("roce", "ub"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load and a deployment. Batches are per NPU package (GPU); `ep` is that of the phase asked about.

    `num_npus` with `prefill_instances` (of `prefill_npus`) and `decode_instances` (of `decode_npus`) matter
    to replay; `pool_bytes` 0 is an infinite pool; `failed` names broken components as in `fabric.topology`,
    comma-separated, for the whole run; `faults` what breaks during a replay, as in `app.twin.faults`.
    `handover_plane` carries KV from prefill to decode in replay: RDMA as in the paper, or UB. With `autoscale`
    the live autoscaler turns instances of a replay from one side to the other, which takes `role_switch_s` each
    time: about what the paper's Table 1 gives for loading a model that the pool holds.
    """

    model: str = "deepseek-r1"
    hardware: str = "ascend-910c"
    plane: str = "ub"
    handover_plane: str = "roce"
    phase: str = "decode"
    prompt_tokens: int = 4096
    output_tokens: int = 256
    batch_per_npu: float = 96
    tokens_per_npu: float = 16384
    ep: int | None = None
    mtp: bool = True
    mtp_acceptance: float = MTP_ACCEPTANCE
    microbatch: bool = True
    eplb: str = "default"
    reuse: float = 0.0
    num_npus: int = 384
    prefill_npus: int = 16
    prefill_instances: int = 6
    decode_npus: int = 160
    decode_instances: int = 1
    pool_bytes: float = 0.0
    slo_tpot_s: float = 0.05
    slo_ttft_s: float = 5.0
    speedup: float = 1.0
    failed: str = ""
    faults: str = ""
    autoscale: bool = False
    role_switch_s: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_values()
        self._check_sizes()

    @property
    def machine(self) -> Hardware:
        """The hardware profile."""
        return profile(self.hardware)

    @property
    def topology(self) -> Topology:
        """The supernode with its failures."""
        return _topology(self.num_npus, self.failed)

    @property
    def faults_in_order(self) -> tuple[Fault, ...]:
        """What breaks during a replay."""
        return parse_faults(self.faults)

    @property
    def decode_ep(self) -> int:
        """EP degree of decode: as asked, else one rank per die (GPU) of a decode instance."""
        if self.ep is not None and self.phase == "decode":
            return self.ep
        return self.decode_npus * self.machine.ranks_per_device

    @property
    def prefill_ep(self) -> int:
        """EP degree of prefill: as asked, else one rank per die (GPU) of a prefill instance."""
        if self.ep is not None and self.phase == "prefill":
            return self.ep
        return self.prefill_npus * self.machine.ranks_per_device

    @property
    def max_sequences_per_npu(self) -> int:
        """Sequences of this length whose KV fits beside the decode weights of one NPU."""
        room = self.kv_bytes_per_npu
        return int(room / ((self.prompt_tokens + self.output_tokens) * r1.KV_BYTES_PER_TOKEN))

    @property
    def kv_bytes_per_npu(self) -> float:
        """HBM of one NPU that decode can fill with KV."""
        machine = self.machine
        free = machine.hbm_bytes - r1.weight_bytes_per_rank(self.decode_ep)
        return KV_MEMORY_SHARE * free * machine.ranks_per_device

    def decode_point(
        self, batch_per_npu: float | None = None, context_tokens: float | None = None
    ) -> DecodePoint:
        """The decode batch of the scenario, or another batch or mean context in the same deployment."""
        batch = self.batch_per_npu if batch_per_npu is None else batch_per_npu
        context = self.prompt_tokens + self.output_tokens / 2 if context_tokens is None else context_tokens
        return DecodePoint(
            batch_per_rank=batch / self.machine.ranks_per_device,
            context_tokens=context,
            ep=self.decode_ep,
            plane=self.wire,
            mtp=self.mtp,
            microbatch=self.microbatch,
            imbalanced=self.eplb == "default",
            fabric_share=surviving_share(self.topology),
            hardware=self.machine,
            parameters=self.parameters,
        )

    def prefill_point(self, tokens_per_npu: float | None = None, **changes: Any) -> PrefillPoint:
        """The prefill batch of the scenario, or another size in the same deployment."""
        tokens = self.tokens_per_npu if tokens_per_npu is None else tokens_per_npu
        point = PrefillPoint(
            tokens_per_rank=tokens / self.machine.ranks_per_device,
            prompt_tokens=self.prompt_tokens,
            ep=self.prefill_ep,
            plane=self.wire,
            microbatch=self.microbatch,
            imbalanced=self.eplb == "default",
            fabric_share=surviving_share(self.topology),
            reuse=self.reuse,
            hardware=self.machine,
            parameters=self.parameters,
        )
        return replace(point, **changes)

    @property
    def parameters(self) -> Parameters:
        """The published fit."""
        return PUBLISHED

    @property
    def wire(self) -> Plane:
        """The plane that carries experts and cached KV: as asked, but GPUs have no UB."""
        return "ub" if self.plane == "ub" and self.machine.has_ub else "roce"

    def _check_values(self) -> None:
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise TwinError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(allowed)}")
        profile(self.hardware)
        for key in ("prompt_tokens", "output_tokens", "batch_per_npu", "tokens_per_npu", "slo_tpot_s", "slo_ttft_s",
                    "speedup"):  # fmt: skip
            if getattr(self, key) <= 0:
                raise TwinError(f"{key}: {getattr(self, key)} must be above 0")
        for key in ("reuse", "mtp_acceptance"):
            if not 0 <= getattr(self, key) <= 1:
                raise TwinError(f"{key}: {getattr(self, key)} is not a share between 0 and 1")
        if self.reuse == 1:
            raise TwinError("reuse: 1 leaves nothing to prefill; at least one token is always computed")
        if self.role_switch_s < 0:
            raise TwinError(f"role_switch_s: {self.role_switch_s} is negative")
        if self.pool_bytes < 0:
            raise TwinError(f"pool_bytes: {self.pool_bytes} is negative; 0 means no limit")
        if self.prompt_tokens + self.output_tokens > 163_840:
            raise TwinError("prompt_tokens: with output_tokens beyond the model's 163,840 positions")

    def _check_sizes(self) -> None:
        try:
            _ = self.topology
        except FabricError as error:
            key = "num_npus" if "num_npus" in str(error) else "failed"
            raise TwinError(f"{key}: {error}") from None
        for key in ("prefill_npus", "prefill_instances", "decode_npus", "decode_instances"):
            if getattr(self, key) < 1:
                raise TwinError(f"{key}: {getattr(self, key)} must be at least 1")
        used = self.prefill_npus * self.prefill_instances + self.decode_npus * self.decode_instances
        if used > self.num_npus:
            raise TwinError(
                f"prefill_instances: {self.prefill_instances} x {self.prefill_npus} NPUs and decode_instances: "
                f"{self.decode_instances} x {self.decode_npus} NPUs need {used}, but num_npus is {self.num_npus}"
            )
        ranks = self.num_npus * self.machine.ranks_per_device
        if self.autoscale and self.prefill_npus != self.decode_npus:
            raise TwinError(
                f"autoscale: instances that change sides have one size, but prefill_npus is {self.prefill_npus} and "
                f"decode_npus {self.decode_npus}"
            )
        self._check_faults()
        if self.ep is not None and not 2 <= self.ep <= ranks:
            raise TwinError(
                f"ep: {self.ep} is not between 2 and the {ranks} ranks of {self.num_npus} devices"
            )
        if r1.weight_bytes_per_rank(self.decode_ep) > self.machine.hbm_bytes:
            need = r1.weight_bytes_per_rank(self.decode_ep) / 1e9
            raise TwinError(f"ep: {self.decode_ep} puts {need:.0f} GB of weights on a rank that has "
                            f"{self.machine.hbm_bytes / 1e9:.0f} GB")  # fmt: skip
        if self.phase == "decode" and self.batch_per_npu > self.max_sequences_per_npu:
            raise TwinError(
                f"batch_per_npu: {self.batch_per_npu:g} sequences of {self.prompt_tokens + self.output_tokens} tokens "
                f"do not fit beside the weights; at most {self.max_sequences_per_npu} do"
            )

    def _check_faults(self) -> None:
        limits = {
            "prefill": self.prefill_instances,
            "decode": self.decode_instances,
            "node": self.topology.num_nodes,
            "pool": self.topology.num_nodes,
        }
        for fault in self.faults_in_order:
            if fault.kind == "fabric":
                try:
                    self.topology.without(fault.component)
                except FabricError as error:
                    raise TwinError(f"faults: {error}, or prefill:I, decode:I, node:N, pool:N") from None
            elif fault.index >= limits[fault.kind]:
                raise TwinError(
                    f"faults: {fault} does not exist; the last one is {fault.kind}:{limits[fault.kind] - 1}"
                )


@lru_cache(maxsize=16)
def _topology(num_npus: int, failed: str) -> Topology:
    broken = [name.strip() for name in failed.split(",") if name.strip()]
    topology = Topology.of_npus(num_npus)
    return topology.without(*broken) if broken else topology


KEYS = {f.name: f.type for f in fields(Scenario)}


def from_mapping(values: Mapping[str, Any], source: str = "scenario") -> Scenario:
    """A scenario from typed values. Raises `TwinError` naming an unknown key or a wrong type."""
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(KEYS)}"
            raise TwinError(f"{source}: unknown key {key!r}{hint}")
        checked[key] = _typed(key, value, source)
    return Scenario(**checked)


def from_words(words: Sequence[str], base: Mapping[str, Any] | None = None) -> Scenario:
    """A scenario from `key=value` words on top of `base`."""
    values = dict(base or {})
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise TwinError(f"--set {word!r}: expected key=value")
        values[key.strip()] = text.strip()
    return from_mapping(values)


def read(path: Path) -> dict[str, Any]:
    """The keys of a JSON or TOML file. Raises `TwinError` naming the file and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TwinError(f"scenario {path}: {error}") from None
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise TwinError(f"scenario {path}: {error}") from None
    if not isinstance(values, dict):
        raise TwinError(f"scenario {path}: expected an object of keys, found {type(values).__name__}")
    return values


def as_dict(scenario: Scenario) -> dict[str, Any]:
    """All keys of a scenario."""
    return asdict(scenario)


def _typed(key: str, value: Any, source: str) -> Any:
    kind = KEYS[key]
    if kind is bool:
        words = {
            "true": True,
            "on": True,
            "1": True,
            "yes": True,
            "false": False,
            "off": False,
            "0": False,
            "no": False,
        }
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise TwinError(f"{source}: {key}: {value!r} is not true or false")
    if kind is str:
        if isinstance(value, str):
            return value
        raise TwinError(f"{source}: {key}: {value!r} is not a word")
    if value is None and key == "ep":
        return None
    return _number(key, value, source, whole=kind is not float)


def _number(key: str, value: Any, source: str, *, whole: bool) -> float | int:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TwinError(f"{source}: {key}: {value!r} is not a number")
    try:
        number = float(value)
    except ValueError:
        raise TwinError(f"{source}: {key}: {value!r} is not a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise TwinError(f"{source}: {key}: {value!r} is not a finite number")
    if not whole:
        return number
    if number != int(number):
        raise TwinError(f"{source}: {key}: {value!r} is not a whole number")
    return int(number)
