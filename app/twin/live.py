"""The live service beside its twin: `calibrate` learns a profile, `compare_live` holds both to the same
workload.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

import numpy as np

from app.twin.client import Call, Seen, Service
from app.twin.errors import TwinError
from app.twin.profile import LiveMachine, Profile
from app.twin.replay import percentiles
from app.twin.simulator import Deployment, Outcome, Simulator
from app.twin.trace import Request
from engine.config import KVLayout
from engine.scheduler import Limits

BLOCK_TOKENS = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1).block_tokens
PROMPT_LENGTHS = (16, 64, 160, 320, 512, 768)
BATCHES = (1, 2, 4, 8)
TIME_ALARM = 0.15
HIT_ALARM = 0.02
"""Drift above which the twin no longer speaks for the service: relative for times, absolute for the hit
share.
"""


def calibrate(base_url: str, model: str, *, api_key: str | None = None, num_requests: int = 48) -> Profile:
    """Measure a running service. Raises `TwinError` when it cannot be reached or serves nothing."""
    service = Service(base_url, model, api_key)
    workers = [w for w in service.get("/api/workers")["workers"] if w.get("model") == model]
    if not workers:
        raise TwinError(f"model: no worker of {service.base_url} serves {model!r}")
    random = Random(secrets.token_hex())  # noqa: S311 - prompts that no pool has seen
    repeats = max(2, num_requests // (2 * len(PROMPT_LENGTHS)))
    service.drive([Call(0, _tokens(random, 64), 8)])
    idle, again = [], []
    for _ in range(repeats):
        for length in PROMPT_LENGTHS:
            prompt = _tokens(random, length)
            idle += service.drive([Call(0, prompt, 24)])
            again += service.drive([Call(0, prompt, 2)])
    batches = [
        service.drive([Call(0, _tokens(random, 32 if b > 1 else n), 48) for _ in range(b)])
        for b in BATCHES
        for n in ((32, 512) if b == 1 else (32,))
    ]
    mixed = service.drive(
        [Call(0, _tokens(random, 32), 160) for _ in range(2)]
        + [Call(0.5 + 0.6 * i, _tokens(random, 512), 2) for i in range(5)]
    )
    return build_profile(model, workers, idle, again, batches, mixed)


def build_profile(
    model: str,
    workers: Sequence[dict[str, Any]],
    idle: Sequence[Seen],
    again: Sequence[Seen],
    batches: Sequence[Sequence[Seen]],
    mixed: Sequence[Seen],
) -> Profile:
    """Solve for a profile.

    `idle`: one request at a time, new prompts; `again`: the same prompts once more; `batches`: several at
    once, the same length each; `mixed`: two long answers, then prompts that come while those are being
    decoded.
    """
    steps = Limits().max_step_tokens
    step_s, token_s, attended_s = _solve(
        [_prefill_terms(_prompt(s), steps) for s in idle], [_phase_s(s, "prefill") for s in idle]
    )

    def alone_s(seen: Seen) -> float:
        return float(np.dot([step_s, token_s, attended_s], _prefill_terms(_prompt(seen), steps)))

    rows, gaps = [], []
    for group in [*([s] for s in idle), *batches]:
        for seen in group:
            rows.append([1.0, len(group), len(group) * (_prompt(seen) + seen.completion_tokens / 2)])
            gaps.append(_gap_s(seen))
    fixed_s, row_s, context_s = _solve(rows, gaps)
    everyone = [*idle, *(seen for group in batches for seen in group)]
    handover = [
        (_prompt(s), max(0.0, s.token_at_s[1] - s.token_at_s[0] - _gap_s(s))) for s in idle if _has_gaps(s)
    ]
    handover_fixed, handover_token = _solve(
        [[1.0, n] for n, _ in handover], [seconds for _, seconds in handover]
    )
    errors = [abs(alone_s(s) / _phase_s(s, "prefill") - 1) for s in idle]
    errors += [
        abs(float(np.dot([fixed_s, row_s, context_s], r)) / g - 1) for r, g in zip(rows, gaps, strict=True)
    ]
    kinds = {role: [w for w in workers if w["role"] in (role, "both")] for role in ("prefill", "decode")}
    return Profile(
        model=model,
        num_prefill=max(1, len(kinds["prefill"])),
        num_decode=max(1, len(kinds["decode"])),
        block_tokens=BLOCK_TOKENS,
        kv_bytes_per_token=_kv_bytes_per_token(idle),
        max_step_tokens=steps,
        prefill_kv_tokens=max(w["kv_blocks_total"] for w in kinds["prefill"] or workers) * BLOCK_TOKENS,
        decode_kv_tokens=max(w["kv_blocks_total"] for w in kinds["decode"] or workers) * BLOCK_TOKENS,
        request_fixed_s=median(s.ttft_s - _phase_s(s, "prefill") for s in idle),
        prefill_step_s=step_s,
        prefill_token_s=token_s,
        prefill_attended_s=attended_s,
        cached_token_s=_cached_token_s(again, (step_s, token_s, attended_s)),
        tokens_per_decode_step=max(1.0, median(_tokens_per_chunk(s) for s in everyone)),
        decode_fixed_s=fixed_s,
        decode_sequence_s=row_s,
        decode_attended_s=context_s,
        handover_fixed_s=handover_fixed,
        handover_token_s=handover_token,
        prefill_slowdown=max(1.0, median(_phase_s(s, "prefill") / alone_s(s) for s in mixed[2:])),
        decode_slowdown=_decode_slowdown(mixed, fixed_s + 2 * row_s + 2 * context_s * 112),
        fit_error=float(np.mean(errors)),
        num_samples=len(errors),
    )


def simulate(requests: Sequence[Request], profile: Profile, seed: int = 0) -> Outcome:
    """Requests through the twin of the service."""
    spec = Deployment(
        prefill_instances=profile.num_prefill,
        decode_instances=profile.num_decode,
        max_running_per_decode=Limits().max_running,
        prefill_npus=1,
        decode_npus=1,
        seed=seed,
    )
    return Simulator(LiveMachine(profile), spec).run(requests)


def replay_live(requests: Sequence[Request], profile: Profile) -> dict[str, Any]:
    """A trace through the twin of this machine's service; block names of the trace are taken as they are."""
    outcome = simulate(requests, profile)
    return {"requests": len(requests), "model": profile.model, **figures(outcome, profile)}


def compare_live(
    base_url: str,
    model: str,
    profile: Profile,
    *,
    num_requests: int = 40,
    rate: float = 1.0,
    seed: int = 0,
    api_key: str | None = None,
) -> dict[str, Any]:
    """The JSON object of `twin live`: measured and simulated figures of one workload, their errors, and the
    alarm.
    """
    service = Service(base_url, model, api_key)
    seen = service.drive(workload(num_requests, rate, seed))
    return against_twin(seen, profile, seed)


def against_twin(seen: Sequence[Seen], profile: Profile, seed: int = 0) -> dict[str, Any]:
    """What was measured beside what the twin makes of the same requests."""
    ordered = sorted(seen, key=lambda s: s.sent_at_s)
    # How often speculation is right depends on the text that was written, as the number of its tokens does.
    per_step = max(1.0, sum(map(_tokens_per_chunk, seen)) / len(seen))
    profile = replace(profile, tokens_per_decode_step=per_step)
    twin = figures(simulate([as_request(s, profile.block_tokens) for s in ordered], profile, seed), profile)
    live = live_figures(ordered)
    errors = {
        "ttft_p50": twin["ttft_s"]["p50"] / live["ttft_s"]["p50"] - 1,
        "tpot_p50": twin["tpot_s"]["p50"] / live["tpot_s"]["p50"] - 1,
        "output_tokens_per_s": twin["output_tokens_per_s"] / live["output_tokens_per_s"] - 1,
        "cache_hit_token_share": twin["cache_hit_token_share"] - live["cache_hit_token_share"],
    }
    drifted = [
        name for name, error in errors.items() if abs(error) > (HIT_ALARM if "share" in name else TIME_ALARM)
    ]
    return {
        "requests": len(ordered),
        "live_measured": live,
        "twin_simulated": twin,
        "errors": errors,
        "drift_alarm": bool(drifted),
        "drifted": drifted,
    }


def workload(num_requests: int, rate: float, seed: int) -> list[Call]:
    """Poisson arrivals; prompts of 64 to 640 tokens, half of which begin with one of four shared prefixes."""
    random = Random(seed + 1)  # noqa: S311 - a workload, not a secret
    # The same lengths and instants for a seed, but other tokens each time: the pool remembers earlier runs.
    words = Random(secrets.token_hex())  # noqa: S311
    prefixes = [_tokens(words, n * BLOCK_TOKENS) for n in (4, 6, 8, 10)]
    calls, at_s = [], 0.0
    for _ in range(num_requests):
        at_s += random.expovariate(rate)
        start = random.choice(prefixes) if random.random() < 0.5 else ()
        calls.append(Call(at_s, start + _tokens(words, random.randint(64, 320)), random.randint(16, 64)))
    return calls


def as_request(seen: Seen, block_tokens: int) -> Request:
    """The call as a trace's request; blocks are named by everything up to their end, as in the live pool."""
    digest = hashlib.sha256()
    names = []
    prompt = seen.call.prompt
    for start in range(0, len(prompt) // block_tokens * block_tokens, block_tokens):
        digest.update(np.asarray(prompt[start : start + block_tokens], dtype="<i8").tobytes())
        names.append(int.from_bytes(digest.digest()[:7], "little"))
    return Request(seen.sent_at_s, len(prompt), max(1, seen.completion_tokens), tuple(names))


def figures(outcome: Outcome, profile: Profile) -> dict[str, Any]:
    """The twin's TTFT, TPOT, rate and hit share; the service's fixed part belongs to every TTFT."""
    done = [j for j in outcome.jobs if j.finished_at is not None and j.first_token_at is not None]
    ttft = [
        j.first_token_at - j.arrived_at + profile.request_fixed_s
        for j in done
        if j.first_token_at is not None
    ]
    tpot = [
        (j.finished_at - j.first_token_at) / (j.request.output_tokens - 1)
        for j in done
        if j.finished_at is not None and j.first_token_at is not None and j.request.output_tokens > 1
    ]
    end_s = max((j.finished_at or 0.0 for j in done), default=0.0) + profile.request_fixed_s
    output = sum(j.request.output_tokens for j in done)
    cached = sum(j.cached_tokens for j in done)
    return {
        "completed": len(done),
        "ttft_s": percentiles(ttft),
        "tpot_s": percentiles(tpot),
        "output_tokens_per_s": output / max(end_s, 1e-9),
        "cache_hit_token_share": cached / max(1, sum(j.request.prompt_tokens for j in done)),
    }


def live_figures(seen: Sequence[Seen]) -> dict[str, Any]:
    """The same figures as the client measured them; cached tokens are the service's own count."""
    end_s = max(s.sent_at_s + s.token_at_s[-1] for s in seen)
    cached = sum(s.record["usage"]["cached_tokens"] or 0 for s in seen)
    return {
        "completed": len(seen),
        "ttft_s": percentiles([s.ttft_s for s in seen]),
        "tpot_s": percentiles([s.tpot_s for s in seen if s.tpot_s is not None]),
        "output_tokens_per_s": sum(s.completion_tokens for s in seen) / end_s,
        "cache_hit_token_share": cached / sum(len(s.call.prompt) for s in seen),
    }


def _prompt(seen: Seen) -> int:
    return len(seen.call.prompt)


def _tokens(random: Random, count: int) -> tuple[int, ...]:
    """Ids that every vocabulary of a few thousand tokens has, above the special ones."""
    return tuple(random.randrange(300, 4000) for _ in range(count))


def _phase_s(seen: Seen, phase: str) -> float:
    """Seconds that a request spent in a phase, by the service's own record."""
    spent = sum(p["duration_s"] for p in seen.record["timeline"] if p["phase"] == phase)
    if spent <= 0:
        raise TwinError(f"request {seen.record.get('request_id')}: its record has no phase {phase!r}")
    return float(spent)


def _prefill_terms(num_tokens: int, max_step_tokens: int) -> list[float]:
    """Steps, tokens and attended tokens of a prompt."""
    return [-(-num_tokens // max_step_tokens), num_tokens, num_tokens * (num_tokens + 1) / 2]


def _has_gaps(seen: Seen) -> bool:
    return len(seen.token_at_s) > 2


def _gap_s(seen: Seen) -> float:
    """The usual time between two chunks, without the handover's gap after the first token.

    The median: while siblings of a batch are still in prefill, they hold up a few of the gaps.
    """
    at = seen.token_at_s[1:] if _has_gaps(seen) else (0.0, seen.ttft_s)
    return max(1e-6, median(b - a for a, b in pairwise(at)))


def _tokens_per_chunk(seen: Seen) -> float:
    return (seen.completion_tokens - 1) / (len(seen.token_at_s) - 1) if _has_gaps(seen) else 1.0


def _solve(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Non-negative least squares of relative errors: terms that come out negative are left out."""
    matrix, target = np.asarray(rows, dtype=float), np.asarray(values, dtype=float)
    weight = 1 / np.maximum(target, 1e-6)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    scaled = matrix / scale * weight[:, None]
    free = list(range(matrix.shape[1]))
    solution = np.zeros(matrix.shape[1])
    while free:
        part = np.linalg.lstsq(scaled[:, free], target * weight, rcond=None)[0]
        if (part >= 0).all():
            solution[free] = part
            break
        free = [index for index, value in zip(free, part, strict=True) if value >= 0]
    return [float(x) for x in solution / scale]


def _cached_token_s(again: Sequence[Seen], per_term: tuple[float, float, float]) -> float:
    """Seconds per found token: what a repeated prompt's prefill takes beyond the part that it computes."""
    step_s, token_s, attended_s = per_term
    found = []
    for seen in again:
        cached = seen.record["usage"]["cached_tokens"] or 0
        rest = _prompt(seen) - cached
        if cached >= 4 * BLOCK_TOKENS:
            attended = sum(range(cached + 1, _prompt(seen) + 1))
            computed_s = step_s + token_s * rest + attended_s * attended
            found.append((_phase_s(seen, "prefill") - computed_s) / cached)
    return max(0.0, median(found)) if found else 0.0


def _decode_slowdown(mixed: Sequence[Seen], alone_s: float) -> float:
    """Gaps of the long answers while a prompt was being computed, over the step alone."""
    busy = [(s.sent_at_s, s.sent_at_s + s.ttft_s) for s in mixed[2:]]
    gaps = []
    for seen in mixed[:2]:
        at = [seen.sent_at_s + t for t in seen.token_at_s]
        for a, b in pairwise(at[1:]):
            if any(start <= a and b <= end for start, end in busy):
                gaps.append(b - a)
    return max(1.0, sum(gaps) / len(gaps) / alone_s) if gaps and alone_s > 0 else 1.0


def _kv_bytes_per_token(seen: Sequence[Seen]) -> int:
    """From the largest transfer of the records: one block."""
    sizes = [t["num_bytes"] for s in seen for t in s.record.get("transfers", [])]
    return max(sizes, default=BLOCK_TOKENS) // BLOCK_TOKENS
