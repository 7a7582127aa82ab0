"""`twin calibrate`: what a running service takes, part by part, then all parts at once.

Alone first: prompts one after another give the parts of a prefill step and of a decode step; batches give what each
more sequence costs; a prompt found in the pool gives what a cached token costs; prompts beside long answers give how
prefill and decode slow each other on shared cores. Then a short load like those that will be asked about: five scales
(prefill, decode, both slowdowns, handover) are moved until the simulator gives each of its requests the TTFT and TPOT
that were measured. That absorbs what no measurement of a single part sees: caches gone cold in a pause, the gateway
and the client at work on the same cores.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import log
from random import Random
from statistics import median
from typing import Any

import numpy as np

from app.twin.client import Call, Seen, Service
from app.twin.errors import TwinError
from app.twin.live import (
    BLOCK_TOKENS,
    as_request,
    is_quiet,
    served_tpot_s,
    served_ttft_s,
    simulate,
    token_ids,
    tokens_per_chunk,
    workload,
)
from app.twin.neighbours import Neighbours
from app.twin.profile import Profile
from engine.scheduler import Limits

PROMPT_LENGTHS = (16, 64, 160, 320, 512, 768)
BATCHES = (1, 2, 4, 8)
LOAD_SEED = 10_007
"""Of the load that is fitted; `twin live` never draws it by default."""
SCALES = ("prefill", "decode", "prefill_slowdown", "decode_slowdown", "handover")
ALONE_SCALES, BESIDE_SCALES = ("prefill", "decode", "handover"), ("prefill_slowdown", "decode_slowdown")
MIN_SAMPLES = 5
"""Fewer requests of a kind settle nothing; then all of the load are taken."""
FIRST_STEP, LAST_STEP = 0.3, 0.005
"""Of the search, relative: it halves its step until nothing that large helps."""


def calibrate(
    base_url: str,
    model: str,
    *,
    api_key: str | None = None,
    num_requests: int = 48,
    load_requests: int = 40,
    rate: float = 1.0,
) -> Profile:
    """Measure a running service. Raises `TwinError` when it cannot be reached or serves nothing.

    `num_requests`: about how many measure the parts; `load_requests`: of the load, `rate` a second.
    """
    service = Service(base_url, model, api_key)
    workers = service.workers()
    random = Random(secrets.token_hex())  # noqa: S311 - prompts that no pool has seen
    repeats = max(2, num_requests // (2 * len(PROMPT_LENGTHS)))
    with Neighbours(w["pid"] for w in workers) as neighbours:

        def drive(calls: list[Call]) -> list[Seen]:
            return service.drive(calls, neighbours)

        drive([Call(0, token_ids(random, 64), 8)])
        idle, again = [], []
        for _ in range(repeats):
            for length in PROMPT_LENGTHS:
                prompt = token_ids(random, length)
                idle += drive([Call(0, prompt, 24)])
                again += drive([Call(0, prompt, 2)])
        batches = [
            drive([Call(0, token_ids(random, 32 if b > 1 else n), 48) for _ in range(b)])
            for b in BATCHES
            for n in ((32, 512) if b == 1 else (32,))
        ]
        mixed = drive(
            [Call(0, token_ids(random, 32), 160) for _ in range(2)]
            + [Call(0.5 + 0.6 * i, token_ids(random, 512), 2) for i in range(5)]
        )
        load = drive(workload(load_requests, rate, LOAD_SEED))
    return fit_load(build_profile(model, workers, quiet(idle), quiet(again), batches, mixed, load), load)


def quiet(seen: Sequence[Seen]) -> list[Seen]:
    """Those that neighbours on this machine left alone; all of them when that is less than half."""
    left_alone = [s for s in seen if is_quiet(s)]
    return left_alone if 2 * len(left_alone) >= len(seen) else list(seen)


def fit_load(profile: Profile, load: Sequence[Seen]) -> Profile:
    """The profile whose simulation of `load` is nearest to what was measured.

    Nearest: the mean over requests of |log| of simulated over measured TTFT and TPOT, and the same of both medians.
    Requests that had the service to themselves settle prefill, decode and handover; the others settle how much
    prefill and decode slow each other. Raises `TwinError` for a load that is empty.
    """
    if not load:
        raise TwinError("calibrate: the load has no requests")
    ordered = sorted(load, key=lambda s: s.sent_at_s)
    requests = [as_request(s, profile.block_tokens) for s in ordered]
    counted = [i for i, s in enumerate(ordered) if is_quiet(s)]
    if 2 * len(counted) < len(ordered):
        counted = list(range(len(ordered)))
    alone = [i for i in counted if is_alone(i, ordered)]
    beside = [i for i in counted if i not in alone]
    profile = replace(profile, tokens_per_decode_step=tokens_per_chunk(ordered))

    def error(scales: Sequence[float], numbers: Sequence[int]) -> float:
        tried = scaled(profile, scales)
        jobs = simulate(requests, tried).jobs
        ratios: list[list[float]] = [[], []]
        for i in numbers:
            ttft_s, tpot_s = served_ttft_s(jobs[i], tried), served_tpot_s(jobs[i])
            seen_tpot_s = ordered[i].tpot_s
            if ttft_s is not None:
                ratios[0].append(log(ttft_s / ordered[i].ttft_s))
            if tpot_s is not None and seen_tpot_s:
                ratios[1].append(log(tpot_s / seen_tpot_s))
        return sum(sum(map(abs, r)) / len(r) + abs(median(r)) for r in ratios if r) / 2

    scales = [1.0] * len(SCALES)
    for names, numbers in ((ALONE_SCALES, alone), (BESIDE_SCALES, beside)):
        if len(numbers) < MIN_SAMPLES:
            numbers = counted
        scales = _descend(partial(error, numbers=numbers), scales, [SCALES.index(name) for name in names])
    return replace(
        scaled(profile, scales),
        load_error=error(scales, counted),
        load_samples=len(counted),
        alone_samples=len(alone),
    )


def is_alone(number: int, ordered: Sequence[Seen]) -> bool:
    """Whether no other request was in the service while this one was."""
    one = ordered[number]
    start, end = one.sent_at_s, one.sent_at_s + one.token_at_s[-1]
    return all(
        other is one or other.sent_at_s >= end or other.sent_at_s + other.token_at_s[-1] <= start
        for other in ordered
    )


def _descend(error: Callable[[list[float]], float], scales: list[float], free: Sequence[int]) -> list[float]:
    """Scales that no step along one of the `free` ones makes better; the same for the same measurements."""
    best, step = error(scales), FIRST_STEP
    while step > LAST_STEP:
        before = best
        for index in free:
            for factor in (1 + step, 1 / (1 + step)):
                tried = [s * factor if i == index else s for i, s in enumerate(scales)]
                if (found := error(tried)) < best - 1e-9:
                    scales, best = tried, found
        if best == before:
            step /= 2
    return scales


def scaled(profile: Profile, scales: Sequence[float]) -> Profile:
    """The profile with its times multiplied, in the order of `SCALES`; a slowdown never falls below 1."""
    prefill, decode, prefill_slowdown, decode_slowdown, handover = scales
    return replace(
        profile,
        prefill_step_s=profile.prefill_step_s * prefill,
        prefill_token_s=profile.prefill_token_s * prefill,
        prefill_attended_s=profile.prefill_attended_s * prefill,
        decode_fixed_s=profile.decode_fixed_s * decode,
        decode_sequence_s=profile.decode_sequence_s * decode,
        decode_attended_s=profile.decode_attended_s * decode,
        prefill_slowdown=max(1.0, profile.prefill_slowdown * prefill_slowdown),
        decode_slowdown=max(1.0, profile.decode_slowdown * decode_slowdown),
        handover_s=profile.handover_s * handover,
    )


def build_profile(
    model: str,
    workers: Sequence[dict[str, Any]],
    idle: Sequence[Seen],
    again: Sequence[Seen],
    batches: Sequence[Sequence[Seen]],
    mixed: Sequence[Seen],
    load: Sequence[Seen] = (),
) -> Profile:
    """Solve for a profile.

    `idle`: one request at a time, new prompts; `again`: the same prompts once more; `batches`: several at
    once, the same length each; `mixed`: two long answers, then prompts that come while those are being
    decoded; `load`: requests as they come, of which those that were alone tell of prefill, too.
    """
    steps = Limits().max_step_tokens
    ordered = sorted(load, key=lambda s: s.sent_at_s)
    alone = [*idle, *(s for i, s in enumerate(ordered) if is_quiet(s) and is_alone(i, ordered))]
    step_s, token_s, attended_s = _solve(
        [_prefill_terms(s, steps) for s in alone], [_phase_s(s, "prefill") for s in alone]
    )

    def alone_s(seen: Seen) -> float:
        return float(np.dot([step_s, token_s, attended_s], _prefill_terms(seen, steps)))

    rows, gaps = [], []
    for group in [*([s] for s in idle), *batches]:
        for seen in group:
            rows.append([1.0, len(group), len(group) * (_num_prompt(seen) + seen.completion_tokens / 2)])
            gaps.append(_gap_s(seen))
    fixed_s, row_s, context_s = _solve(rows, gaps)
    everyone = [*idle, *(seen for group in batches for seen in group)]
    handover = [max(0.0, s.token_at_s[1] - s.token_at_s[0] - _gap_s(s)) for s in idle if _has_gaps(s)]
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
        cached_token_s=_cached_token_s(again, (step_s, token_s, attended_s), steps),
        tokens_per_decode_step=tokens_per_chunk(everyone),
        decode_fixed_s=fixed_s,
        decode_sequence_s=row_s,
        decode_attended_s=context_s,
        # Of no use is the mean: a few handovers wait for a thread that sleeps, and the size of the prompt hardly
        # matters, because all blocks but the last are published while the rest is still being computed.
        handover_s=median(handover) if handover else 0.0,
        prefill_slowdown=max(1.0, median(_phase_s(s, "prefill") / alone_s(s) for s in mixed[2:])),
        decode_slowdown=_decode_slowdown(mixed, fixed_s + 2 * row_s + 2 * context_s * 112),
        fit_error=float(np.mean(errors)),
        num_samples=len(errors),
    )


def _num_prompt(seen: Seen) -> int:
    return len(seen.call.prompt)


def _phase_s(seen: Seen, phase: str) -> float:
    """Seconds that a request spent in a phase, by the service's own record."""
    spent = sum(p["duration_s"] for p in seen.record["timeline"] if p["phase"] == phase)
    if spent <= 0:
        raise TwinError(f"request {seen.record.get('request_id')}: its record has no phase {phase!r}")
    return float(spent)


def _prefill_terms(seen: Seen, max_step_tokens: int) -> list[float]:
    """Steps, tokens and attended tokens of the part of a prompt that was computed."""
    total, cached = _num_prompt(seen), seen.record["usage"]["cached_tokens"] or 0
    computed = total - cached
    return [-(-computed // max_step_tokens), computed, (total * (total + 1) - cached * (cached + 1)) / 2]


def _has_gaps(seen: Seen) -> bool:
    return len(seen.token_at_s) > 2


def _gap_s(seen: Seen) -> float:
    """The usual time between two chunks, without the handover's gap after the first token.

    The median: while siblings of a batch are still in prefill, they hold up a few of the gaps.
    """
    at = seen.token_at_s[1:] if _has_gaps(seen) else (0.0, seen.ttft_s)
    return max(1e-6, median(b - a for a, b in pairwise(at)))


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


def _cached_token_s(again: Sequence[Seen], per_term: Sequence[float], max_step_tokens: int) -> float:
    """Seconds per found token: what a repeated prompt's prefill takes beyond the part that it computes."""
    found = []
    for seen in again:
        cached = seen.record["usage"]["cached_tokens"] or 0
        if cached >= 4 * BLOCK_TOKENS:
            computed_s = float(np.dot(per_term, _prefill_terms(seen, max_step_tokens)))
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
