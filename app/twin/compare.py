"""Two deployments side by side: UB against RoCE, or any what-if against any other."""

from collections.abc import Mapping
from typing import Any

from app.twin import deepseek as r1
from app.twin.errors import TwinError
from app.twin.predict import predict
from app.twin.scenario import Scenario, from_words
from fabric.cost import transfer_time
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


def variant(text: str, base: Mapping[str, Any]) -> Scenario:
    """The scenario that a side names: `ub`, `roce`, or changed keys such as `failed=l2:0.0` or
    `ep=64,reuse=0.5`.
    """
    words = [f"plane={text}"] if text in ("ub", "roce") else _split(text)
    return from_words(words, base)


def compare(left: str, right: str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object of `twin compare LEFT RIGHT`.

    `ratio` tells for each figure how many times better the left side is than the right one. `handover_s`: the
    KV of one prompt from an NPU of one node to one of another, on the side's plane.
    """
    sides = {}
    for text in (left, right):
        scenario = variant(text, base or {})
        sides[text] = {**predict(scenario), "handover_s": handover_s(scenario)}
    if left == right:
        raise TwinError(f"compare: both sides are {left!r}")
    ratio = {}
    for figure, more_is_better in FIGURES.items():
        a, b = float(sides[left][figure]), float(sides[right][figure])
        if a > 0 and b > 0:
            ratio[figure] = a / b if more_is_better else b / a
    return {"left": left, "right": right, "sides": sides, "ratio": ratio}


def handover_s(scenario: Scenario) -> float:
    """KV of one prompt between the first and the last NPU of the supernode."""
    num_bytes = scenario.prompt_tokens * r1.KV_BYTES_PER_TOKEN
    src, dst = Place("npu", 0), Place("npu", scenario.num_npus - 1)
    return transfer_time(src, dst, num_bytes, scenario.prefill_point().plane, topology=scenario.topology)


def _split(text: str) -> list[str]:
    """Words at commas, except that `failed` may hold a list: a part without `=` belongs to the word before."""
    words: list[str] = []
    for part in text.split(","):
        if "=" in part or not words:
            words.append(part)
        else:
            words[-1] += "," + part
    return words
