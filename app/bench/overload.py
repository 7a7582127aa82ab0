"""`cloudmatrix bench overload`: what is left of the goodput when five times as much arrives as can be served.

A ramp of open-loop rates, well past the knee, finds the peak of the goodput; then `factor` times the rate of that peak
arrives for `duration_s`. Goodput: requests that met both objectives, over the seconds in which requests arrived; what
is answered after the last arrival adds no seconds, so that steps of different lengths can be compared. The service is
started for it, with the objectives as its targets.
"""

import contextlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.bench.load import LoadOptions, run_load
from app.bench.peers import machine
from app.bench.served import make_prompts, service
from app.models.entry import ModelEntry
from app.text.tokenizer import Tokenizer

CLEAN = ("status 429", "status 503")
GROWTH = 1.25
WARM_UP_S = 8.0
"""Of the first rate, not counted: the workers' first steps, and rates that admission learns."""
PAST_KNEE = 0.75
"""The ramp ends at the second rate of which less than this share is goodput."""
MAX_STEPS = 8
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class OverloadOptions:
    """What arrives and what is wanted of it. `ramp_s`: seconds of each rate of the ramp."""

    entry: ModelEntry
    threads: int = 2
    slo_ttft_s: float = 2.0
    slo_tpot_s: float = 0.1
    prompt_tokens: int = 128
    output_tokens: int = 32
    first_rate: float = 4.0
    ramp_s: float = 20.0
    factor: float = 5.0
    duration_s: float = 60.0


def run_overload(options: OverloadOptions, say: Say) -> dict[str, Any]:
    """The ramp and the overload. Raises ServedError when the service does not come up."""
    entry = options.entry
    tokenizer = Tokenizer.load(
        entry.tokenizer_path, bos_token_id=entry.bos_token_id if entry.add_bos else None
    )
    targets = {
        "CLOUDMATRIX_TTFT_TARGET_S": str(options.slo_ttft_s),
        "CLOUDMATRIX_TPOT_TARGET_S": str(options.slo_tpot_s),
    }
    with _environment(targets), service(model=entry.id, threads=options.threads) as url:
        seeds = iter(range(1, 1000))

        def at(rate: float, seconds: float) -> dict[str, Any]:
            num = max(1, round(rate * seconds))
            prompts = make_prompts(
                tokenizer, num=num, tokens=options.prompt_tokens, shared_tokens=1, seed=next(seeds)
            )
            before = _rejections(url)
            row = _row(rate, seconds, _load(options, url, [text for text, _ in prompts], rate, next(seeds)))
            row["reasons"] = dict(_rejections(url) - before)
            say(
                f"{rate:.1f} requests/s: goodput {row['goodput_per_s']:.2f}, {row['refused']} refused "
                f"{row['reasons']}, {row['broken']} broken"
            )
            return row

        at(options.first_rate, WARM_UP_S)
        ramp = [at(options.first_rate, options.ramp_s)]
        while (
            sum(row["goodput_per_s"] < PAST_KNEE * row["rate"] for row in ramp) < 2 and len(ramp) < MAX_STEPS
        ):
            ramp.append(at(ramp[-1]["rate"] * GROWTH, options.ramp_s))
        peak = max(ramp, key=lambda row: float(row["goodput_per_s"]))
        overload = at(options.factor * peak["goodput_per_s"], options.duration_s)
    return {
        "machine": machine(),
        "slo": {"ttft_s": options.slo_ttft_s, "tpot_s": options.slo_tpot_s},
        "ramp": ramp,
        "peak_goodput_per_s": peak["goodput_per_s"],
        "overload": overload,
        "kept": overload["goodput_per_s"] / peak["goodput_per_s"],
    }


def _load(
    options: OverloadOptions, url: str, prompts: Sequence[str], rate: float, seed: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in prompts), encoding="utf-8")
        return run_load(
            LoadOptions(
                base_url=url,
                model=options.entry.id,
                requests=len(prompts),
                prompts=path,
                max_tokens=options.output_tokens,
                ignore_eos=True,
                rate=rate,
                seed=seed,
                slo_ttft_s=options.slo_ttft_s,
                slo_tpot_s=options.slo_tpot_s,
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


def _row(rate: float, seconds: float, result: dict[str, Any]) -> dict[str, Any]:
    refused = sum(times for error, times in result["errors"].items() if error.startswith(CLEAN))
    return {
        "rate": rate,
        "requests": result["requests"],
        "completed": result["completed"],
        "refused": refused,
        "broken": result["failed"] - refused,
        "goodput_per_s": result["good"] / seconds,
        "ttft_p99_s": result["ttft_s"]["p99"],
        "tpot_p99_s": result["tpot_s"]["p99"],
        "errors": result["errors"],
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
    """Goodput over the rate that arrived, the overload as the last point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [*result["ramp"], result["overload"]]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([row["rate"] for row in rows], [row["goodput_per_s"] for row in rows], marker="o")
    axes.axhline(0.9 * result["peak_goodput_per_s"], linestyle="--", label="90 % of the peak")
    axes.set(xlabel="requests/s that arrive", ylabel="goodput, requests/s")
    axes.set_ylim(0, math.ceil(result["peak_goodput_per_s"] * 1.2))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
