"""`twin replay`: a trace through a simulated deployment, summed up."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from app.matrix.autoscaler import Side
from app.twin.fleet import Deployment, Unit
from app.twin.instance import Job
from app.twin.machine import Machine, SupernodeMachine
from app.twin.outcome import Outcome
from app.twin.pool import ideal_hit_share
from app.twin.predict import label
from app.twin.scenario import Scenario, as_dict
from app.twin.simulator import Simulator
from app.twin.trace import BLOCK_TOKENS, Request


def deployment(scenario: Scenario) -> Deployment:
    """The instances that a scenario describes."""
    return Deployment(
        prefill_instances=scenario.prefill_instances,
        decode_instances=scenario.decode_instances,
        max_running_per_decode=int(scenario.batch_per_npu * scenario.decode_npus),
        prefill_npus=scenario.prefill_npus,
        decode_npus=scenario.decode_npus,
        pool_bytes=scenario.pool_bytes or None,
        num_pool_servers=scenario.topology.num_nodes,
        faults=scenario.faults_in_order,
        autoscale=scenario.autoscale,
        role_switch_s=scenario.role_switch_s,
        slo_ttft_s=scenario.slo_ttft_s,
        slo_tpot_s=scenario.slo_tpot_s,
        seed=scenario.seed,
    )


def replay(requests: Sequence[Request], scenario: Scenario) -> dict[str, Any]:
    """The JSON object of `twin replay`. `wall_s` is this machine's, all else is virtual time.

    With faults or the autoscaler the same requests run again without, for the ratio that they cost or bring.
    """
    started = time.perf_counter()
    cpu_started = time.process_time()
    summary = simulate(requests, scenario)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    if scenario.faults:
        without = simulate(requests, replace(scenario, faults=""))
        summary["faults"] = {
            "injected": [str(fault) for fault in scenario.faults_in_order],
            "restarts": summary["restarts"],
            "recomputed_tokens": summary["recomputed_tokens"],
            "not_served": summary["requests"] - summary["completed"],
            "slowdown": slowdown(summary, without),
        }
        summary["without_faults"] = without
    if scenario.autoscale:
        summary["without_autoscale"] = simulate(requests, replace(scenario, autoscale=False))
    capacity = scenario.pool_bytes or None
    block_bytes = SupernodeMachine(scenario).kv_bytes_per_token * BLOCK_TOKENS
    summary["ideal_cache_hit_token_share"] = ideal_hit_share(requests, block_bytes, capacity)
    summary |= {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "requests_per_wall_s": len(requests) / wall_s,
        "requests_per_cpu_s": len(requests) / cpu_s,
        "scenario": as_dict(scenario),
    }
    return summary


def simulate(requests: Sequence[Request], scenario: Scenario) -> dict[str, Any]:
    """One run of the scenario, summed up."""
    machine = SupernodeMachine(scenario)
    return summarise(Simulator(machine, deployment(scenario)).run(requests), machine, scenario)


def slowdown(run: dict[str, Any], without: dict[str, Any]) -> dict[str, float]:
    """How many times as long requests took as in the run without: mean and p90 of the three times."""
    return {
        f"{name}_{kind}": run[f"{name}_s"][kind] / without[f"{name}_s"][kind]
        for name in ("ttft", "tpot", "e2e")
        for kind in ("mean", "p90")
        if run[f"{name}_s"][kind] is not None and without[f"{name}_s"][kind]
    }


def summarise(outcome: Outcome, machine: Machine, scenario: Scenario) -> dict[str, Any]:
    """Everything of a run that does not depend on the clock of this machine."""
    done = [job for job in outcome.jobs if job.finished_at is not None]
    ttft = [job.first_token_at - job.arrived_at for job in done if job.first_token_at is not None]
    e2e = [job.finished_at - job.arrived_at for job in done if job.finished_at is not None]
    tpot = [
        (job.finished_at - job.first_token_at) / (job.request.output_tokens - 1)
        for job in done
        if job.finished_at is not None and job.first_token_at is not None and job.request.output_tokens > 1
    ]
    span_s = max(outcome.now, 1e-9)
    prompt = sum(job.request.prompt_tokens for job in done)
    output = sum(job.request.output_tokens for job in done)
    good = sum(1 for job in done if _meets(job, scenario))
    return {
        "requests": len(outcome.jobs),
        "completed": len(done),
        "sim_duration_s": outcome.now,
        "num_events": outcome.num_events,
        "ttft_s": percentiles(ttft),
        "tpot_s": percentiles(tpot),
        "e2e_s": percentiles(e2e),
        "cache_hit_token_share": outcome.hit_tokens / max(1, outcome.prompt_tokens),
        "throughput": {
            "prompt_tokens_per_s": prompt / span_s,
            "output_tokens_per_s": output / span_s,
            "requests_per_s": len(done) / span_s,
            "output_tokens_per_s_per_npu": output / span_s / scenario.num_npus,
        },
        "goodput_requests_per_s": good / span_s,
        "slo_attainment": good / max(1, len(outcome.jobs)),
        "prefill_busy_share": _busy_share(outcome.units, "prefill"),
        "decode_busy_share": _busy_share(outcome.units, "decode"),
        "mean_decode_sequences": [
            unit.sequence_s / unit.busy_s["decode"] if unit.busy_s["decode"] else 0.0
            for unit in outcome.units
            if unit.role_s["decode"]
        ],
        "pool": {
            "loaded_bytes": outcome.loaded_bytes,
            "modelled_s": outcome.load_s,
            "idle_path_s": outcome.load_idle_s,
            "evicted_blocks": outcome.pool_evictions,
            "lost_blocks": outcome.pool_blocks_lost,
        },
        "handover": {
            "num_bytes": outcome.handed_over_bytes,
            "modelled_s": outcome.handover_s,
            "idle_path_s": outcome.handover_idle_s,
        },
        "preemptions": outcome.num_preempted,
        "restarts": outcome.num_restarted,
        "recomputed_tokens": outcome.recomputed_tokens,
        "role_changes": [
            {"at_s": at, "instance": change.worker_id, "role": change.role, "reason": change.reason}
            for at, change in outcome.role_changes
        ],
        "kv_bytes_per_token": machine.kv_bytes_per_token,
        "trust": _trust(outcome, scenario),
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 by the nearest rank, and the mean; None when there are no values."""
    if not values:
        return {"p50": None, "p90": None, "p99": None, "mean": None}
    ordered = sorted(values)

    def rank(share: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, -(-int(share * len(ordered) * 100) // 100) - 1))]

    return {"p50": rank(0.50), "p90": rank(0.90), "p99": rank(0.99), "mean": sum(ordered) / len(ordered)}


def _trust(outcome: Outcome, scenario: Scenario) -> dict[str, Any]:
    """The label of the mean steps of a run. Steps only: no published result says how a supernode queues."""
    jobs = outcome.jobs
    decode_s = sum(unit.busy_s["decode"] for unit in outcome.units)
    sequences = sum(unit.sequence_s for unit in outcome.units) / max(decode_s, 1e-9)
    prompt = sum(job.request.prompt_tokens for job in jobs) / max(1, len(jobs))
    output = sum(job.request.output_tokens for job in jobs) / max(1, len(jobs))
    found = label(
        scenario,
        {
            "batch_per_npu": sequences / scenario.decode_npus,
            "context_tokens": prompt + output / 2,
            "decode_ep": scenario.decode_ep,
            "prefill_prompt_tokens": prompt,
            "prefill_ep": scenario.prefill_ep,
            "reuse": outcome.hit_tokens / max(1, outcome.prompt_tokens),
        },
    )
    return found | {
        "covers": "mean prefill and decode steps; queues, faults and contention are not published"
    }


def _busy_share(units: Sequence[Unit], side: Side) -> list[float]:
    """Of the time that each unit spent on that side; units that never did are left out."""
    return [unit.busy_s[side] / unit.role_s[side] for unit in units if unit.role_s[side]]


def _meets(job: Job, scenario: Scenario) -> bool:
    if job.finished_at is None or job.first_token_at is None:
        return False
    if job.first_token_at - job.arrived_at > scenario.slo_ttft_s:
        return False
    tokens = job.request.output_tokens - 1
    return tokens == 0 or (job.finished_at - job.first_token_at) / tokens <= scenario.slo_tpot_s
