"""`cloudmatrix bench overload`: what is left of the goodput when five times as much arrives as can be served.

A ramp of open-loop rates, well past the knee, finds the two rates of most goodput, a and b. They are then measured
afresh on both sides of the overload, a b OVERLOAD b a, and the peak is the better one's mean. Two faults of an easier
way are avoided so: the best of many short steps is above what the service can do by as much as luck made it the best;
and a machine that slows down or speeds up after the ramp would be counted for or against the overload.

The overload is `factor` times the most goodput seen until then, for `duration_s`. Goodput: requests that met both
objectives, by the second in which they arrived. The beginning of every rate is not counted: while the queue fills, more
is let in than served, which would flatter short steps. The service is started for it, with the objectives as its
targets; load is generated on the same machine.
"""

import contextlib
import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.bench.client import Outcome
from app.bench.load import LoadOptions, meets, percentiles, run_outcomes
from app.bench.peers import machine
from app.bench.served import make_prompts, service
from app.models.entry import ModelEntry
from app.text.tokenizer import Tokenizer

CLEAN = (429, 503)
GROWTH = 1.25
WARM_UP_S = 6.0
"""Of the first rate, not counted: the workers' first steps."""
SETTLE_SHARE = 1.5
"""Of the objective for the first token, the time of every rate that is not counted: longer than a request may wait."""
PAST_KNEE = 0.75
"""The ramp ends at the second rate of which less than this share is goodput."""
MAX_STEPS = 8
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class OverloadOptions:
    """What arrives and what is wanted of it. `ramp_s`: seconds of each rate of the ramp; `peak_s`: of each measurement
    of a rate near the peak, four in all."""

    entry: ModelEntry
    threads: int = 2
    slo_ttft_s: float = 2.0
    slo_tpot_s: float = 0.1
    prompt_tokens: int = 128
    output_tokens: int = 32
    first_rate: float = 8.0
    ramp_s: float = 12.0
    peak_s: float = 18.0
    factor: float = 5.0
    duration_s: float = 60.0


def run_overload(options: OverloadOptions, say: Say) -> dict[str, Any]:
    """The ramp, and the overload between two measurements of the peak. Raises ServedError when the service does not
    come up."""
    entry = options.entry
    tokenizer = Tokenizer.load(
        entry.tokenizer_path, bos_token_id=entry.bos_token_id if entry.add_bos else None
    )
    targets = {
        "CLOUDMATRIX_TTFT_TARGET_S": str(options.slo_ttft_s),
        "CLOUDMATRIX_TPOT_TARGET_S": str(options.slo_tpot_s),
    }
    settle_s = SETTLE_SHARE * options.slo_ttft_s
    with _environment(targets), service(model=entry.id, threads=options.threads) as url:
        seeds = iter(range(1, 1000))

        def at(rate: float, seconds: float) -> dict[str, Any]:
            num = max(2, round(rate * (settle_s + seconds)))
            prompts = make_prompts(
                tokenizer, num=num, tokens=options.prompt_tokens, shared_tokens=1, seed=next(seeds)
            )
            before = _rejections(url)
            outcomes = _load(options, url, [text for text, _ in prompts], rate, next(seeds))
            row = {"rate": rate, **count(outcomes, options.slo_ttft_s, options.slo_tpot_s)}
            row["reasons"] = dict(_rejections(url) - before)
            say(
                f"{rate:.1f} requests/s: goodput {row['goodput_per_s']:.2f}, {row['refused']} refused "
                f"{row['reasons']}, {row['broken']} broken, late {row['late']}"
            )
            return row

        at(options.first_rate, WARM_UP_S)
        ramp = [at(options.first_rate, options.ramp_s)]
        while (
            sum(row["goodput_per_s"] < PAST_KNEE * row["rate"] for row in ramp) < 2 and len(ramp) < MAX_STEPS
        ):
            ramp.append(at(ramp[-1]["rate"] * GROWTH, options.ramp_s))
        best, second = near_peak(ramp)
        beside = [at(rate, options.peak_s) for rate in (best["rate"], second["rate"])]
        most_per_s = max(float(row["goodput_per_s"]) for row in (best, *beside))
        overload = at(options.factor * most_per_s, options.duration_s)
        beside += [at(rate, options.peak_s) for rate in (second["rate"], best["rate"])]
    peak_per_s = peak_goodput(beside)
    return {
        "machine": machine(),
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "slo": {"ttft_s": options.slo_ttft_s, "tpot_s": options.slo_tpot_s},
        "ramp": ramp,
        "beside": beside,
        "peak_goodput_per_s": peak_per_s,
        "overload": overload,
        "kept": overload["goodput_per_s"] / peak_per_s,
        "kept_of_best_step": overload["goodput_per_s"] / best["goodput_per_s"],
    }


def near_peak(ramp: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The two steps of most goodput, the best one first."""
    return sorted(ramp, key=lambda row: float(row["goodput_per_s"]), reverse=True)[:2]


def peak_goodput(beside: Iterable[Mapping[str, Any]]) -> float:
    """The goodput of the rate that has most of it, as the mean over its measurements."""
    by_rate: dict[float, list[float]] = {}
    for row in beside:
        by_rate.setdefault(row["rate"], []).append(row["goodput_per_s"])
    return max(map(statistics.fmean, by_rate.values()))


def _load(
    options: OverloadOptions, url: str, prompts: Sequence[str], rate: float, seed: int
) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in prompts), encoding="utf-8")
        return run_outcomes(
            LoadOptions(
                base_url=url,
                model=options.entry.id,
                requests=len(prompts),
                prompts=path,
                max_tokens=options.output_tokens,
                ignore_eos=True,
                rate=rate,
                seed=seed,
            )
        )


def _rejections(url: str) -> Counter[str]:
    """Requests that the gateway turned away so far, by reason."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return Counter(
        {
            sample.labels["reason"]: int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "vllm:admission_rejections_total"
        }
    )


def count(outcomes: Sequence[Outcome], slo_ttft_s: float, slo_tpot_s: float) -> dict[str, Any]:
    """What became of the requests that one rate sent, two at least.

    `goodput_per_s` counts those that arrived after the settling time; `seconds` has a row for each second of arrivals,
    the settling ones included; the other figures are of all. `refused` are 429 and 503 with a time to come back; `late`
    of the completed ones missed an objective, by which.
    """
    began = min(outcome.started_at for outcome in outcomes)
    settle_s = SETTLE_SHARE * slo_ttft_s
    window_s = max(outcome.started_at for outcome in outcomes) - began - settle_s
    completed = [outcome for outcome in outcomes if outcome.error is None]
    good = [outcome for outcome in completed if meets(outcome, slo_ttft_s, slo_tpot_s)]
    refused = [o for o in outcomes if o.status in CLEAN and o.retry_after_s is not None]
    errors = Counter(str(outcome.error) for outcome in outcomes if outcome.error is not None)
    arrived_s, good_s, refused_s = (
        Counter(int(outcome.started_at - began) for outcome in some) for some in (outcomes, good, refused)
    )
    return {
        "requests": len(outcomes),
        "completed": len(completed),
        "refused": len(refused),
        "broken": len(outcomes) - len(completed) - len(refused),
        "late": {
            "ttft": sum(not meets(o, slo_ttft_s, None) for o in completed),
            "tpot": sum(not meets(o, None, slo_tpot_s) for o in completed),
        },
        "goodput_per_s": sum(o.started_at - began >= settle_s for o in good) / max(window_s, 1.0),
        "ttft_p99_s": percentiles([o.ttft_s for o in completed if o.ttft_s is not None])["p99"],
        "tpot_p99_s": percentiles([o.tpot_s for o in completed if o.tpot_s is not None])["p99"],
        "refusal_p99_s": percentiles([o.e2e_s for o in refused])["p99"],
        "errors": dict(errors.most_common(10)),
        "seconds": [
            {"arrived": arrived_s[at], "good": good_s[at], "refused": refused_s[at]}
            for at in range(max(arrived_s) + 1)
        ],
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def plot(result: dict[str, Any], path: Path) -> None:
    """Goodput over the rate that arrived, the overload as the last point; and the overload second by second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    peak, overload, beside = result["peak_goodput_per_s"], result["overload"], result["beside"]
    rows = [*result["ramp"], overload]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    left.plot([row["rate"] for row in rows], [row["goodput_per_s"] for row in rows], marker="o")
    left.plot(
        [row["rate"] for row in beside],
        [row["goodput_per_s"] for row in beside],
        linestyle="",
        marker="x",
        label="again, before and after the overload",
    )
    left.set(xlabel="requests/s that arrive", ylabel="goodput, requests/s")
    left.set_title(f"kept {result['kept']:.0%} of the peak at {overload['rate'] / peak:.0f} times its rate")
    seconds = overload["seconds"]
    for name, label in (
        ("refused", "429 / 503 at once or in time"),
        ("good", "answered within the objectives"),
    ):
        right.plot(range(len(seconds)), [second[name] for second in seconds], label=label, linewidth=1)
    right.set(xlabel="second of the overload", ylabel="requests that arrived in it")
    right.set_title(f"{overload['requests']} requests, {overload['broken']} broken")
    left.set_ylim(0, math.ceil(max(row["goodput_per_s"] for row in rows) * 1.2))
    right.set_ylim(0, 1.4 * max(second["refused"] for second in seconds) + 20)
    for axes, corner in ((left, "lower right"), (right, "upper right")):
        axes.axhline(0.9 * peak, linestyle="--", color="grey", label="90 % of the peak")
        axes.legend(loc=corner)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
