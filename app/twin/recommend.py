"""`twin recommend`: the smallest deployment that serves a trace within its SLOs, and what a million tokens
cost.

Sizes come from the steady state first: the largest batch within the TPOT target, NPUs for its tokens, NPUs
for the prompts that the pool does not hold. The simulation then checks the answer on the trace itself and
adds instances until enough requests meet both targets; a quarter of the trace sorts out what is hopeless
first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from app.twin import deepseek as r1
from app.twin.errors import TwinError
from app.twin.pool import hit_curve
from app.twin.replay import replay
from app.twin.scenario import Scenario, from_mapping
from app.twin.trace import BLOCK_TOKENS, Request

DECODE_NPUS = (16, 32, 48, 64, 96, 128, 160, 256, 320)
"""Sizes of a decode instance that are tried; EP is one rank per die."""
POOL_BYTES = (0.25e12, 0.5e12, 1e12, 2e12, 4e12, 8e12)
PROBE_REQUESTS = 1000
PROBE_SLACK = 0.03
"""The pool is empty when a trace begins, so its first part meets the targets less often than the whole."""
PREFILL_HEADROOM = 0.7
"""Busy share of prefill instances that the first guess aims at; bursts need the rest."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Stated, not known: change them to yours. US dollars."""

    npu_hour: float = 2.0
    pool_gb_hour: float = 0.005


def recommend(
    requests: Sequence[Request],
    base: Mapping[str, Any],
    tpot_targets_s: Sequence[float] = (0.050, 0.030, 0.015),
    *,
    prices: Prices | None = None,
    attainment: float = 0.9,
) -> dict[str, Any]:
    """The JSON object of `twin recommend`: one answer per TPOT target.

    `attainment`: share of requests that must meet the TTFT and the TPOT target. An answer that cannot be
    found within the supernode says so under `reason` and has no deployment.
    """
    prices = prices or Prices()
    if not 0 < attainment <= 1:
        raise TwinError(f"attainment: {attainment} is not a share above 0 and up to 1")
    for target in tpot_targets_s:
        if target <= 0:
            raise TwinError(f"slo_tpot_s: {target} must be above 0")
    load = Load.of(requests)
    scenario = from_mapping(dict(base) | {"prefill_instances": 1, "decode_npus": 16, "decode_instances": 1,
                                          "prompt_tokens": max(1, round(load.mean_prompt)),
                                          "output_tokens": max(1, round(load.mean_output)),
                                          "batch_per_npu": 1, "phase": "prefill"})  # fmt: skip
    curve = hit_curve(requests, r1.KV_BYTES_PER_TOKEN * BLOCK_TOKENS, POOL_BYTES)
    pool_bytes, hit_share = _best_pool(scenario, load, curve, prices)
    answers = []
    for target in tpot_targets_s:
        wanted = replace(scenario, slo_tpot_s=target, pool_bytes=pool_bytes)
        answer = _answer(requests, wanted, load, hit_share, attainment)
        if not answer["met"] and answer["scenario"] and wanted.handover_plane == "roce":
            # A short answer to a long prompt spends most of a tight TPOT on the handover.
            over_ub = _answer(requests, replace(wanted, handover_plane="ub"), load, hit_share, attainment)
            if over_ub["met"]:
                met_without = answer["slo_attainment"]
                over_ub["reason"] = f"with KV handover on UB; on RDMA {met_without:.1%} of requests meet both"
                answer = over_ub
        answers.append({"slo_tpot_s": target, **answer})
    for answer in answers:
        if answer.get("scenario"):
            answer |= _cost(answer, load, pool_bytes, prices)
    return {
        "load": load.as_dict(),
        "slo_ttft_s": scenario.slo_ttft_s,
        "attainment": attainment,
        "prices": {"npu_hour": prices.npu_hour, "pool_gb_hour": prices.pool_gb_hour},
        "hit_curve": [{"pool_bytes": capacity, "hit_token_share": share} for capacity, share in curve],
        "answers": answers,
    }


@dataclass(frozen=True, slots=True)
class Load:
    """Means of a trace; rates per second."""

    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    mean_prompt: float
    mean_output: float
    duration_s: float

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Load":
        """The load of a trace."""
        duration_s = max(requests[-1].arrival_s, 1.0)
        prompt = sum(r.prompt_tokens for r in requests)
        output = sum(r.output_tokens for r in requests)
        count = len(requests)
        return cls(
            count / duration_s,
            prompt / duration_s,
            output / duration_s,
            prompt / count,
            output / count,
            duration_s,
        )

    def as_dict(self) -> dict[str, float]:
        """For the JSON."""
        return {
            "requests_per_s": self.requests_per_s,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "mean_prompt_tokens": self.mean_prompt,
            "mean_output_tokens": self.mean_output,
            "duration_s": self.duration_s,
        }


def _best_pool(
    scenario: Scenario, load: Load, curve: Sequence[tuple[float, float]], prices: Prices
) -> tuple[float, float]:
    """The pool whose DRAM and the prefill NPUs it leaves necessary are cheapest together."""

    def hourly(item: tuple[float, float]) -> float:
        capacity, share = item
        return _prefill_npus(scenario, load, share) * prices.npu_hour + capacity / 1e9 * prices.pool_gb_hour

    return min(curve, key=hourly)


def _prefill_npus(scenario: Scenario, load: Load, hit_share: float) -> float:
    point = scenario.prefill_point(reuse=min(hit_share, 0.9))
    return load.prompt_tokens_per_s / (scenario.tokens_per_npu / point.batch_s())


def _largest_batch(scenario: Scenario) -> int | None:
    """Sequences per NPU within the TPOT target and the memory; None when not even one per die is fast enough."""

    def fits(batch: int) -> bool:
        return scenario.decode_point(batch).tpot_s(scenario.mtp_acceptance) <= scenario.slo_tpot_s

    smallest = scenario.machine.ranks_per_device
    if not fits(smallest) or scenario.max_sequences_per_npu < smallest:
        return None
    low, high = smallest, scenario.max_sequences_per_npu + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _answer(
    requests: Sequence[Request], scenario: Scenario, load: Load, hit_share: float, attainment: float
) -> dict[str, Any]:
    candidates = []
    prefill = max(
        1, ceil(_prefill_npus(scenario, load, hit_share) / PREFILL_HEADROOM / scenario.prefill_npus)
    )
    for npus in DECODE_NPUS:
        ranks = npus * scenario.machine.ranks_per_device
        if r1.weight_bytes_per_rank(ranks) >= scenario.machine.hbm_bytes or npus > scenario.num_npus:
            continue
        sized = replace(scenario, phase="decode", ep=ranks)
        batch = _largest_batch(sized)
        if batch is None:
            continue
        tpot_s = sized.decode_point(batch).tpot_s(sized.mtp_acceptance)
        instances = max(1, ceil(load.output_tokens_per_s * tpot_s / batch / npus))
        candidates.append((instances * npus, npus, instances, batch))
    best: tuple[float, Scenario, dict[str, Any]] | None = None
    probe = requests[: max(PROBE_REQUESTS, len(requests) // 4)]
    for _, npus, instances, batch in sorted(candidates):
        for more_prefill in range(4):
            used = (prefill + more_prefill) * scenario.prefill_npus + instances * npus
            if used > scenario.num_npus:
                break
            tried = replace(
                scenario, phase="decode", ep=npus * scenario.machine.ranks_per_device, decode_npus=npus,
                decode_instances=instances, batch_per_npu=batch, prefill_instances=prefill + more_prefill,
            )  # fmt: skip
            result = replay(probe, tried)
            if result["slo_attainment"] >= attainment - PROBE_SLACK:
                result = replay(requests, tried)
            if best is None or result["slo_attainment"] > best[0]:
                best = (result["slo_attainment"], tried, result)
            if result["slo_attainment"] >= attainment:
                return _found(tried, result)
            if (result["ttft_s"]["p99"] or 0) <= scenario.slo_ttft_s:
                break  # prefill is not what is missing
    if best is None:
        return {
            "scenario": None,
            "met": False,
            "reason": "no decode instance within the supernode is that fast",
        }
    share, tried, _ = best
    return _found(tried, replay(requests, tried)) | {
        "met": False,
        "reason": f"the best that was tried meets both targets for {share:.1%} of requests",
    }


def _found(scenario: Scenario, result: dict[str, Any]) -> dict[str, Any]:
    prefill = scenario.prefill_npus * scenario.prefill_instances
    decode = scenario.decode_npus * scenario.decode_instances
    return {
        "met": True,
        "handover_plane": scenario.handover_plane,
        "prefill_npus": prefill,
        "decode_npus": decode,
        "num_npus": prefill + decode,
        "prefill_to_decode": f"{prefill}:{decode}",
        "max_batch_per_npu": scenario.batch_per_npu,
        "pool_bytes": scenario.pool_bytes,
        "slo_attainment": result["slo_attainment"],
        "ttft_s": result["ttft_s"],
        "tpot_s": result["tpot_s"],
        "cache_hit_token_share": result["cache_hit_token_share"],
        "output_tokens_per_s": result["throughput"]["output_tokens_per_s"],
        "trust": result["trust"],
        "scenario": result["scenario"],
    }


def _cost(answer: Mapping[str, Any], load: Load, pool_bytes: float, prices: Prices) -> dict[str, float]:
    hourly = answer["num_npus"] * prices.npu_hour + pool_bytes / 1e9 * prices.pool_gb_hour
    per_hour = 3600 * (load.prompt_tokens_per_s + load.output_tokens_per_s)
    return {
        "cost_per_hour": hourly,
        "cost_per_million_tokens": hourly / per_hour * 1e6,
        "cost_per_million_output_tokens": hourly / (3600 * load.output_tokens_per_s) * 1e6,
    }
