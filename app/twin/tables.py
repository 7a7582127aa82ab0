"""The terminal tables of `cloudmatrix twin …`; titles say whether numbers are measured, modelled or simulated."""

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

PAPER = "arXiv 2506.12708 v3"


def key_table(title: str) -> Callable[[dict[str, Any]], Table]:
    """One row per key of the JSON."""

    def build(result: dict[str, Any]) -> Table:
        table = Table("key", "value", title=title)
        for key, value in result.items():
            table.add_row(key, _text(value))
        return table

    return build


def replay_table(result: dict[str, Any]) -> Table:
    """Key figures of a replay; beside them those of the run without faults, or without the autoscaler."""
    others = {
        title: result[key]
        for key, title in (("without_faults", "without faults"), ("without_autoscale", "fixed roles"))
        if key in result
    }
    runs = [result, *others.values()]
    table = Table("figure", "this run", *others, title="replay (simulated: no figure here is measured)")

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(text(run) for run in runs))

    row("requests completed", lambda r: f"{r['completed']:,} of {r['requests']:,}")
    row("TTFT p50 / p90 / p99 (s)", lambda r: _percentiles(r["ttft_s"]))
    row("TPOT p50 / p90 / p99 (ms)", lambda r: _percentiles(r["tpot_s"], 1e3))
    row("whole p50 / p90 / p99 (s)", lambda r: _percentiles(r["e2e_s"]))
    row("both targets met", lambda r: f"{r['slo_attainment']:.1%}")
    row("output tokens/s", lambda r: f"{r['throughput']['output_tokens_per_s']:,.0f}")
    row("prompt tokens found in the pool", lambda r: f"{r['cache_hit_token_share']:.1%}")
    row("prefill busy, mean", lambda r: _mean_share(r["prefill_busy_share"]))
    row("decode busy, mean", lambda r: _mean_share(r["decode_busy_share"]))
    row("KV handover: GB, s, slower than idle", lambda r: _transfers(r["handover"]))
    row("pool loads: GB, s, slower than idle", lambda r: _transfers(r["pool"]))
    row("restarts / tokens computed again", lambda r: f"{r['restarts']} / {r['recomputed_tokens']:,}")
    row("instances that changed sides", lambda r: str(len(r["role_changes"])))
    speed = f"{result['requests_per_cpu_s']:,.0f} requests simulated per CPU second (measured)"
    table.caption = f"{trust_text(result['trust'])}\n{speed}"
    return table


def _percentiles(times: dict[str, float | None], scale: float = 1.0) -> str:
    shown = (times[p] for p in ("p50", "p90", "p99"))
    return " / ".join("-" if value is None else f"{scale * value:.4g}" for value in shown)


def trust_text(trust: dict[str, Any]) -> str:
    """A trust label in words."""
    if trust["inside"]:
        return "inside the range that published results cover"
    return "outside the range that published results cover: " + "; ".join(trust["reasons"])


def _mean_share(shares: list[float]) -> str:
    return f"{sum(shares) / len(shares):.1%}" if shares else "-"


def _transfers(moved: dict[str, Any]) -> str:
    num_bytes = moved.get("num_bytes", moved.get("loaded_bytes", 0))
    slower = max(0.0, moved["modelled_s"] / moved["idle_path_s"] - 1) if moved["idle_path_s"] else 0.0
    return f"{num_bytes / 1e9:,.0f}, {moved['modelled_s']:.4g}, {slower:+.1%}"


def validation_table(result: dict[str, Any]) -> Table:
    """The error table, calibrated rows first; why exceptions are exceptions stands below."""
    mean, worst = result["held_out_mean_abs_error"], result["held_out_max_abs_error"]
    table = Table(
        title="twin (modelled) against published results", box=SIMPLE_HEAD, expand=True, padding=(0, 1, 0, 0)
    )
    for name, wraps in (
        ("role", 0),
        ("what", 1),
        ("published", 0),
        ("predicted", 0),
        ("error", 0),
        ("source", 1),
    ):
        table.add_column(name, no_wrap=not wraps, ratio=wraps or None)
    reasons: list[str] = []
    for row in [*result["rows"], *result["exceptions"]]:
        role = row["role"]
        if "reason" in row:
            if row["reason"] not in reasons:
                reasons.append(row["reason"])
            role += f" {reasons.index(row['reason']) + 1}"
        table.add_row(
            role, row["name"], f"{row['published']:g} {row['unit']}", f"{row['predicted']:.4g}",
            f"{row['error']:+.1%}", row["source"].removeprefix(f"{PAPER}, "),
        )  # fmt: skip
    told = [f"exception {number}: {reason}" for number, reason in enumerate(reasons, 1)]
    held_out = f"held out: mean |error| {mean:.1%}, largest {worst:.1%}, {result['num_held_out']} rows"
    table.caption = "\n".join([f"source: {PAPER} unless another is named", *told, held_out])
    return table


def recommendation_table(result: dict[str, Any]) -> Table:
    """One row per TPOT target."""
    prices = result["prices"]
    table = Table(
        "TPOT", "P:D NPUs", "batch/NPU", "handover", "pool", "both met", "TPOT p90", "TTFT p90", "$/M tokens",
        title="recommendation (simulated)", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    caption = [
        f"at ${prices['npu_hour']:g} per NPU hour and ${prices['pool_gb_hour']:g} per GB hour of pool (stated)"
    ]
    for answer in result["answers"]:
        target = f"{answer['slo_tpot_s'] * 1e3:g} ms"
        if not answer.get("scenario"):
            table.add_row(target, answer["reason"])
            continue
        table.add_row(
            target, answer["prefill_to_decode"], f"{answer['max_batch_per_npu']:g}", answer["handover_plane"],
            f"{answer['pool_bytes'] / 1e12:g} TB",
            f"{answer['slo_attainment']:.1%}" + ("" if answer["met"] else " (not met)"),
            f"{answer['tpot_s']['p90'] * 1e3:.1f} ms", f"{answer['ttft_s']['p90']:.2f} s",
            f"{answer['cost_per_million_tokens']:.2f}",
        )  # fmt: skip
        caption.append(f"{target}: {trust_text(answer['trust'])}")
    table.caption = "\n".join(caption)
    return table


def comparison_table(result: dict[str, Any]) -> Table:
    """Two deployments and by how much the left one is better."""
    left, right = result["left"], result["right"]
    table = Table("figure", left, right, f"{left} better by", title="comparison (modelled)")
    for figure, ratio in result["ratio"].items():
        a, b = result["sides"][left][figure], result["sides"][right][figure]
        table.add_row(figure, _text(a), _text(b), f"x{ratio:.3g}")
    table.caption = "\n".join(
        f"{side}: {trust_text(result['sides'][side]['trust'])}" for side in (left, right)
    )
    return table


def live_table(result: dict[str, Any]) -> Table:
    """Each round measured and simulated, and the median errors."""
    rounds = result["rounds"]
    verdict = "drift alarm: " + ", ".join(result["drifted"]) if result["drift_alarm"] else "no drift"
    if result["is_disturbed"]:
        verdict += "; neighbours used this machine's cores all the time: measure again when it is quiet"
    disturbed = sum(one["disturbed"] for one in rounds)
    table = Table(
        "figure", *(f"round {i}: measured / simulated" for i in range(1, len(rounds) + 1)), "median error", "within",
        title="live (measured) against twin (simulated)",
        caption=f"{verdict}. {disturbed} of {sum(one['requests'] for one in rounds)} requests ran beside neighbours",
    )  # fmt: skip
    figures = {
        "ttft_p50": ("TTFT p50 (ms)", 1e3, 0.15),
        "tpot_p50": ("TPOT p50 (ms)", 1e3, 0.15),
        "output_tokens_per_s": ("output tokens/s", 1.0, 0.15),
        "cache_hit_token_share": ("hit share (%)", 100.0, 0.02),
    }

    def figure(side: dict[str, Any], name: str) -> float:
        return float(side[name.replace("_p50", "_s")]["p50"] if "_p50" in name else side[name])

    for name, (title, scale, limit) in figures.items():
        pairs = [
            f"{scale * figure(one['live_measured'], name):.4g} / {scale * figure(one['twin_simulated'], name):.4g}"
            for one in rounds
        ]
        unit = " points" if "share" in name else " %"
        table.add_row(title, *pairs, f"{100 * result['errors'][name]:+.1f}{unit}", f"{100 * limit:g}{unit}")
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "-"
    return "-" if value is None else str(value)
