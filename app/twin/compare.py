"""Two deployments side by side: UB against RoCE, or any what-if against any other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.twin import deepseek as r1
from app.twin.errors import TwinError
from app.twin.predict import predict
from app.twin.replay import simulate
from app.twin.scenario import Scenario, from_words
from app.twin.trace import read
from fabric.cost import transfer_time
from fabric.gpu_cluster import GPUCluster
from fabric.topology import Place

FIGURES = {
    "prefill_tokens_per_s_per_npu": True,
    "decode_tokens_per_s_per_npu": True,
    "ttft_s": False,
    "tpot_s": False,
    "handover_s": False,
    "pool_load_s": False,
}
"""What is compared, and whether more is better."""
REPLAYED = {
    "slo_attainment": True,
    "ttft_s.p50": False,
    "ttft_s.p90": False,
    "tpot_s.p50": False,
    "tpot_s.p90": False,
    "cache_hit_token_share": True,
    "handover.modelled_s": False,
}
"""With a trace also these, of a replay on each side."""


def variant(text: str, base: Mapping[str, Any]) -> Scenario:
    """The scenario that a side names: `ub`, `roce`, or changed keys such as `failed=l2:0.0` or
    `ep=64,reuse=0.5`.
    """
    words = [f"plane={text}"] if text in ("ub", "roce") else _split(text)
    return from_words(words, base)


def compare(
    left: str, right: str, base: Mapping[str, Any] | None = None, trace: Path | None = None
) -> dict[str, Any]:
    """The JSON object of `twin compare LEFT RIGHT`.

    `ratio` tells for each figure how many times better the left side is than the right one. `handover_s`: the
    KV of one prompt from an NPU of one node to one of another, on the side's plane. With a trace, both sides replay
    it (`REPLAYED`), which shows what the steady state cannot: the size of the pool, queues, faults.
    """
    if left == right:
        raise TwinError(f"compare: both sides are {left!r}")
    sides: dict[str, dict[str, Any]] = {}
    for text in (left, right):
        scenario = variant(text, base or {})
        sides[text] = {**predict(scenario), "handover_s": handover_s(scenario)}
        if trace is not None:
            run = simulate(read(trace, scenario.speedup), scenario)
            sides[text] |= {figure: _at(run, figure) for figure in REPLAYED} | {
                "trust_of_replay": run["trust"]
            }
    ratio = {}
    for figure, more_is_better in (FIGURES | (REPLAYED if trace is not None else {})).items():
        a, b = float(sides[left][figure] or 0), float(sides[right][figure] or 0)
        if a > 0 and b > 0:
            ratio[figure] = a / b if more_is_better else b / a
    return {"left": left, "right": right, "sides": sides, "ratio": ratio}


def _at(run: Mapping[str, Any], figure: str) -> Any:
    found: Any = run
    for key in figure.split("."):
        found = found[key]
    return found


def handover_s(scenario: Scenario) -> float:
    """KV of one prompt between the first and the last NPU of the supernode, or GPU of a cluster of the same size."""
    num_bytes = scenario.prompt_tokens * r1.KV_BYTES_PER_TOKEN
    if not scenario.machine.has_ub:
        cluster = GPUCluster(scenario.num_npus, nic_bytes_per_s=scenario.machine.nic_bytes_per_s)
        return cluster.transfer_time(0, scenario.num_npus - 1, num_bytes)
    src, dst = Place("npu", 0), Place("npu", scenario.num_npus - 1)
    return transfer_time(src, dst, num_bytes, scenario.wire, topology=scenario.topology)


def _split(text: str) -> list[str]:
    """Words at commas, except that `failed` may hold a list: a part without `=` belongs to the word before."""
    words: list[str] = []
    for part in text.split(","):
        if "=" in part or not words:
            words.append(part)
        else:
            words[-1] += "," + part
    return words
