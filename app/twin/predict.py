"""One steady-state point: what a deployment does under a load that never changes."""

from collections.abc import Mapping
from typing import Any

from app.twin import deepseek as r1
from app.twin.scenario import Scenario

VALIDATED = {
    "batch_per_npu": (8, 128),
    "context_tokens": (1024, 4352),
    "decode_ep": (8, 320),
    "tokens_per_npu": (16384, 16384),
    "prefill_prompt_tokens": (4096, 4096),
    "prefill_ep": (32, 32),
    "reuse": (0.0, 0.9),
}
"""Ranges that the rows of `validate` span."""


def predict(scenario: Scenario) -> dict[str, Any]:
    """The JSON object of `twin predict`. Times in seconds, rates per NPU package (per GPU on GPU profiles).

    `tpot_s` counts MTP's extra tokens; `ttft_s` is the prefill of a whole batch without queueing. `trust`
    says whether the point lies inside the range that published results cover, and where not.
    """
    decode, prefill = scenario.decode_point(), scenario.prefill_point()
    layer = decode.layer()
    tpot_s = decode.tpot_s(scenario.mtp_acceptance)
    batch_s = prefill.batch_s()
    return {
        "model": scenario.model,
        "hardware": scenario.hardware,
        "plane": scenario.wire,
        "phase": scenario.phase,
        "prefill_tokens_per_s_per_npu": scenario.tokens_per_npu / batch_s,
        "decode_tokens_per_s_per_npu": scenario.batch_per_npu / tpot_s,
        "ttft_s": batch_s,
        "tpot_s": tpot_s,
        "step_s": decode.step_s(),
        "decode_layer_s": layer.seconds,
        "decode_attention_stream_s": layer.attention_s,
        "decode_moe_stream_s": layer.moe_s,
        "decode_attention_cores": layer.attention_cores,
        "prefill_layer_s": prefill.layer_s(),
        "pool_load_s": prefill.load_s(),
        "fabric_share": decode.fabric_share,
        "max_batch_per_npu": scenario.max_sequences_per_npu,
        "kv_bytes_per_token": r1.KV_BYTES_PER_TOKEN,
        "trust": trust(scenario),
    }


def trust(scenario: Scenario) -> dict[str, Any]:
    """Whether published rows surround the point: `inside`, and the reasons when it is not."""
    values: dict[str, float] = {
        "batch_per_npu": scenario.batch_per_npu,
        "context_tokens": scenario.prompt_tokens + scenario.output_tokens / 2,
        "decode_ep": scenario.decode_ep,
    }
    if scenario.phase == "prefill":
        values = {
            "tokens_per_npu": scenario.tokens_per_npu,
            "prefill_prompt_tokens": scenario.prompt_tokens,
            "prefill_ep": scenario.prefill_ep,
            "reuse": scenario.reuse,
        }
    return label(scenario, values)


def label(scenario: Scenario, values: Mapping[str, float]) -> dict[str, Any]:
    """The trust label of a prediction made at these values of `VALIDATED`'s keys."""
    reasons = []
    for key, value in values.items():
        low, high = VALIDATED[key]
        if not low <= value <= high:
            found = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            reasons.append(f"{key} {found} is outside the validated {low:,g} to {high:,g}")
    if scenario.plane != "ub":
        reasons.append("no published result on this machine uses RoCE for expert traffic")
    if scenario.hardware != "ascend-910c":
        reasons.append(
            "calibrated on Ascend 910C; five published rows of GPUs are missed by 3 to 18 % (`twin validate`)"
        )
    if scenario.failed:
        reasons.append("no published result has broken components")
    return {"inside": not reasons, "reasons": reasons}
