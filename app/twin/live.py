"""The live service beside its twin: one workload through both, their figures, the errors, and the drift alarm."""

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random
from statistics import median
from typing import Any

import numpy as np

from app.twin.client import Call, Seen, Service
from app.twin.fleet import Deployment
from app.twin.instance import Job
from app.twin.neighbours import Neighbours
from app.twin.outcome import Outcome
from app.twin.profile import LiveMachine, Profile
from app.twin.replay import percentiles
from app.twin.simulator import Simulator
from app.twin.trace import Request
from engine.config import KVLayout
from engine.scheduler import Limits

BLOCK_TOKENS = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1).block_tokens
TIME_ALARM = 0.15
HIT_ALARM = 0.02
"""Drift above which the twin no longer speaks for the service: relative for times, absolute for the hit share."""
QUIET_CORES = 0.25
"""Cores that neighbours keep busy beside a request up to which its times count."""


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
    return {
        "requests": len(requests),
        "model": profile.model,
        **figures(outcome, profile),
        "trust": _trust(profile),
    }


def _trust(profile: Profile) -> dict[str, Any]:
    """Whether the profile met the load that it was made from; `twin live` tells whether it meets others."""
    reasons = []
    if profile.load_error is None:
        reasons.append("the profile was made without a load")
    elif profile.load_error > TIME_ALARM:
        reasons.append(f"the profile misses the load that it was made from by {profile.load_error:.0%}")
    return {"inside": not reasons, "reasons": reasons}


def compare_live(
    base_url: str,
    model: str,
    profile: Profile,
    *,
    num_requests: int = 40,
    rate: float = 1.0,
    seed: int = 0,
    rounds: int = 1,
    api_key: str | None = None,
) -> dict[str, Any]:
    """The JSON object of `twin live`: measured and simulated figures of each round, and the median error.

    Each round is a workload of its own (`seed`, `seed + 1`, …). Drift is judged on the medians over the rounds.
    """
    service = Service(base_url, model, api_key)
    found = []
    with Neighbours(w["pid"] for w in service.workers()) as neighbours:
        for number in range(rounds):
            seen = service.drive(workload(num_requests, rate, seed + number), neighbours)
            found.append({"seed": seed + number, **against_twin(seen, profile, seed + number)})
    errors = {name: median(one["errors"][name] for one in found) for name in found[0]["errors"]}
    return {"rounds": found, "errors": errors, **_alarm(errors, found)}


def against_twin(seen: Sequence[Seen], profile: Profile, seed: int = 0) -> dict[str, Any]:
    """What was measured beside what the twin makes of the same requests.

    TTFT and TPOT are taken, on both sides, over the requests that neighbours on this machine left alone, unless that
    is less than half; `disturbed` says how many were not.
    """
    ordered = sorted(seen, key=lambda s: s.sent_at_s)
    counted = [i for i, s in enumerate(ordered) if is_quiet(s)]
    disturbed = len(ordered) - len(counted)
    if 2 * len(counted) < len(ordered):
        counted = list(range(len(ordered)))
    # How often speculation is right depends on the text that was written, as the number of its tokens does.
    profile = replace(profile, tokens_per_decode_step=tokens_per_chunk(ordered))
    requests = [as_request(s, profile.block_tokens) for s in ordered]
    twin = figures(simulate(requests, profile, seed), profile, counted)
    live = live_figures(ordered, counted)
    errors = {
        "ttft_p50": twin["ttft_s"]["p50"] / live["ttft_s"]["p50"] - 1,
        "tpot_p50": twin["tpot_s"]["p50"] / live["tpot_s"]["p50"] - 1,
        "output_tokens_per_s": twin["output_tokens_per_s"] / live["output_tokens_per_s"] - 1,
        "cache_hit_token_share": twin["cache_hit_token_share"] - live["cache_hit_token_share"],
    }
    return {
        "requests": len(ordered),
        "disturbed": disturbed,
        "live_measured": live,
        "twin_simulated": twin,
        "errors": errors,
        **_alarm(errors, []),
    }


def _alarm(errors: dict[str, float], rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the twin drifted, and in what. Beside neighbours in every round nobody can tell: `is_disturbed`."""
    drifted = [
        name for name, error in errors.items() if abs(error) > (HIT_ALARM if "share" in name else TIME_ALARM)
    ]
    found: dict[str, Any] = {"drift_alarm": bool(drifted), "drifted": drifted}
    if rounds:
        found["is_disturbed"] = all(2 * one["disturbed"] > one["requests"] for one in rounds)
    return found


def is_quiet(seen: Seen) -> bool:
    """Whether nothing is known of neighbours that kept the machine's cores busy beside this request."""
    return seen.neighbour_cores is None or seen.neighbour_cores <= QUIET_CORES


def workload(num_requests: int, rate: float, seed: int) -> list[Call]:
    """Poisson arrivals; prompts of 64 to 640 tokens, half of which begin with one of four shared prefixes."""
    random = Random(seed + 1)  # noqa: S311 - a workload, not a secret
    # The same lengths and instants for a seed, but other tokens each time: the pool remembers earlier runs.
    words = Random(secrets.token_hex())  # noqa: S311
    prefixes = [token_ids(words, n * BLOCK_TOKENS) for n in (4, 6, 8, 10)]
    calls, at_s = [], 0.0
    for _ in range(num_requests):
        at_s += random.expovariate(rate)
        start = random.choice(prefixes) if random.random() < 0.5 else ()
        calls.append(Call(at_s, start + token_ids(words, random.randint(64, 320)), random.randint(16, 64)))
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


def figures(outcome: Outcome, profile: Profile, counted: Collection[int] | None = None) -> dict[str, Any]:
    """The twin's TTFT, TPOT, rate and hit share; times of the jobs numbered in `counted` (None: of all)."""
    done = [job for job in outcome.jobs if job.finished_at is not None]
    timed = done if counted is None else [job for job in done if job.number in counted]
    end_s = max((job.finished_at or 0.0 for job in done), default=0.0) + profile.request_fixed_s
    cached = sum(job.cached_tokens for job in done)
    return {
        "completed": len(done),
        "ttft_s": percentiles([t for job in timed if (t := served_ttft_s(job, profile)) is not None]),
        "tpot_s": percentiles([t for job in timed if (t := served_tpot_s(job)) is not None]),
        "output_tokens_per_s": sum(job.request.output_tokens for job in done) / max(end_s, 1e-9),
        "cache_hit_token_share": cached / max(1, sum(job.request.prompt_tokens for job in done)),
    }


def served_ttft_s(job: Job, profile: Profile) -> float | None:
    """Simulated seconds to the first token; the service's fixed part belongs to every request."""
    if job.first_token_at is None:
        return None
    return job.first_token_at - job.arrived_at + profile.request_fixed_s


def served_tpot_s(job: Job) -> float | None:
    """Simulated seconds per token after the first; None for a request that has none or was not finished."""
    if job.finished_at is None or job.first_token_at is None or job.request.output_tokens < 2:
        return None
    return (job.finished_at - job.first_token_at) / (job.request.output_tokens - 1)


def live_figures(seen: Sequence[Seen], counted: Collection[int] | None = None) -> dict[str, Any]:
    """The same figures as the client measured them; cached tokens are the service's own count."""
    timed = [s for i, s in enumerate(seen) if counted is None or i in counted]
    end_s = max(s.sent_at_s + s.token_at_s[-1] for s in seen)
    cached = sum(s.record["usage"]["cached_tokens"] or 0 for s in seen)
    return {
        "completed": len(seen),
        "ttft_s": percentiles([s.ttft_s for s in timed]),
        "tpot_s": percentiles([s.tpot_s for s in timed if s.tpot_s is not None]),
        "output_tokens_per_s": sum(s.completion_tokens for s in seen) / end_s,
        "cache_hit_token_share": cached / sum(len(s.call.prompt) for s in seen),
    }


def tokens_per_chunk(seen: Sequence[Seen]) -> float:
    """Tokens that came at a time after the first: more than one when the engine's guesses were right."""
    chunks = sum(len(s.token_at_s) - 1 for s in seen)
    return max(1.0, sum(s.completion_tokens - 1 for s in seen) / chunks) if chunks else 1.0


def token_ids(random: Random, count: int) -> tuple[int, ...]:
    """Ids that every vocabulary of a few thousand tokens has, above the special ones."""
    return tuple(random.randrange(300, 4000) for _ in range(count))
