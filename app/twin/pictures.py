"""The pictures of `twin report`. Each says in itself that it is modelled or simulated, so that it can stand alone.

A picture is a dict: `name` for its file, `title`, `note` for under it, and `figure`.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from app.twin import deepseek as r1
from app.twin.linkload import node_to_l2_load
from app.twin.outcome import Outcome
from app.twin.pool import hit_curve, ideal_hit_share
from app.twin.predict import trust
from app.twin.scenario import Scenario
from app.twin.trace import BLOCK_TOKENS, Request
from fabric.topology import NPUS_PER_NODE

BATCHES = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
POOL_TB = (0.05, 0.1, 0.25, 0.5, 0.75, 1.08, 1.5, 2, 3, 4, 6, 8)
PUBLISHED_POINTS = ((49.4, 1943), (14.9, 538))
"""(TPOT in ms, tokens/s per NPU) with 4096 + 256 tokens, arXiv 2506.12708 v3, Table 4."""
UB_COLOUR, ROCE_COLOUR = "#1f5fa8", "#c8641b"


def pareto_points(scenario: Scenario) -> list[tuple[float, float, float]]:
    """(batch per NPU, TPOT in seconds, decode tokens/s per NPU) for every batch that fits."""
    points = []
    for batch in BATCHES:
        if batch <= scenario.max_sequences_per_npu:
            tpot_s = scenario.decode_point(batch).tpot_s(scenario.mtp_acceptance)
            points.append((float(batch), tpot_s, batch / tpot_s))
    return points


def pareto(scenario: Scenario) -> dict[str, Any]:
    """Throughput against latency on UB and RoCE, with the published points where they apply."""
    figure, axes = _axes("TPOT (ms)", "decode tokens/s per NPU")
    sides = [replace(scenario, plane=plane) for plane in ("ub", "roce")]
    for side, colour, name in zip(sides, (UB_COLOUR, ROCE_COLOUR), ("UB", "RoCE"), strict=True):
        points = pareto_points(side)
        axes.plot([1e3 * p[1] for p in points], [p[2] for p in points], "-", color=colour, label=name)
        for batch, tpot_s, rate in points:
            inside = trust(replace(side, phase="decode", batch_per_npu=batch))["inside"]
            face = colour if inside else "white"
            axes.plot([1e3 * tpot_s], [rate], "o", color=colour, markerfacecolor=face, ms=5)
        for batch, tpot_s, rate in points[2::3]:
            aside = (-18, 3) if side.plane == "ub" else (6, -11)
            style = {"textcoords": "offset points", "xytext": aside, "fontsize": 8, "color": colour}
            axes.annotate(f"{batch:g}", (1e3 * tpot_s, rate), **style)
    if _is_published_load(scenario):
        axes.plot(
            *zip(*PUBLISHED_POINTS, strict=True), "*", color="#1c2430", ms=10, label="published (measured)"
        )
    for slo_ms in (15, 30, 50):
        axes.axvline(slo_ms, color="#9aa4b1", lw=0.8, ls="--")
        soft = {"textcoords": "offset points", "xytext": (3, -9), "fontsize": 8, "color": "#5b6675"}
        axes.annotate(f"{slo_ms} ms", (slo_ms, 1), xycoords=("data", "axes fraction"), **soft)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    load = f"{scenario.prompt_tokens} + {scenario.output_tokens} tokens, EP{scenario.decode_ep}"
    axes.set_title(f"modelled: DeepSeek-R1 decode, {load}", fontsize=10, loc="left")
    return {
        "name": "pareto",
        "title": "Throughput against latency",
        "figure": figure,
        "note": "Numbers at the points are batch per NPU, dashed lines common TPOT targets. Filled points lie "
        "inside the range that published results cover, hollow ones outside. The RoCE curve moves expert traffic "
        "over 200 Gbps per die; nobody has published such a run.",
    }


def _is_published_load(scenario: Scenario) -> bool:
    same = (scenario.prompt_tokens, scenario.output_tokens, scenario.decode_ep) == (4096, 256, 320)
    return same and scenario.hardware == "ascend-910c" and scenario.mtp


def hits(requests: Sequence[Request], scenario: Scenario) -> dict[str, Any]:
    """Share of prompt tokens that pools of several sizes hold."""
    figure, axes = _axes("pool size (TB)", "prompt tokens found (%)")
    block_bytes = r1.KV_BYTES_PER_TOKEN * BLOCK_TOKENS
    curve = hit_curve(requests, block_bytes, [tb * 1e12 for tb in POOL_TB])
    axes.plot([c / 1e12 for c, _ in curve], [100 * share for _, share in curve], "o-", color=UB_COLOUR, ms=5)
    limit = 100 * ideal_hit_share(requests, block_bytes, None)
    axes.axhline(limit, color="#9aa4b1", lw=0.8, ls="--")
    axes.annotate(
        f"no limit: {limit:.1f} %", (POOL_TB[0], limit), textcoords="offset points", xytext=(0, 4), fontsize=8,
        color="#5b6675",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(POOL_TB, [f"{tb:g}" for tb in POOL_TB], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * limit + 1e-9)
    axes.set_title(f"simulated: LRU pool, {len(requests):,} requests of the trace", fontsize=10, loc="left")
    return {
        "name": "hits",
        "title": "Hit ratio against pool size",
        "figure": figure,
        "note": f"Blocks of {BLOCK_TOKENS} tokens at {r1.KV_BYTES_PER_TOKEN:,} B of KV per token, every prompt "
        f"computed when it arrives; the pool of this run has {_size(scenario.pool_bytes)}.",
    }


def _size(pool_bytes: float) -> str:
    return f"{pool_bytes / 1e12:g} TB" if pool_bytes else "no limit"


def heat(scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    """How full the uplinks of every L1 chip were."""
    load = node_to_l2_load(scenario, outcome)
    figure, axes = _axes("node", "UB sub-plane", height=3.4)
    image = axes.imshow(
        [[100 * value for value in row] for row in load],
        aspect="auto",
        cmap="YlOrRd",
        vmin=0,
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.set_yticks(range(len(load)))
    for side, colour in (("prefill", UB_COLOUR), ("decode", ROCE_COLOUR)):
        # Where an instance turned, the side it ended on.
        nodes = [
            npu / NPUS_PER_NODE
            for u in outcome.units
            if u.role == side
            for npu in (u.npus[0], u.npus[-1] + 1)
        ]
        if nodes:
            first, last = min(nodes) - 0.5, max(nodes) - 0.5
            axes.plot([first + 0.1, last - 0.1], [-0.75, -0.75], color=colour, lw=3, clip_on=False)
            axes.annotate(side, (first, -0.75), xytext=(0, 4), textcoords="offset points", fontsize=8, color=colour,
                          annotation_clip=False)  # fmt: skip
    axes.set_ylim(len(load) - 0.5, -0.5)
    figure.colorbar(image, ax=axes, label="mean load of uplinks (%)").ax.yaxis.labelpad = 10
    axes.set_title(
        "simulated: uplinks of each node's L1 chips to the L2 chips", fontsize=10, loc="left", pad=20
    )
    return {
        "name": "links",
        "title": "Link heat map",
        "figure": figure,
        "note": "Mean use over the run of each L1 chip's uplinks: expert exchange of the tokens that instances "
        "computed, blocks from and to the pool, and KV handover when it runs on UB"
        + (" (here it does)." if scenario.handover_plane == "ub" else " (here it runs on the RDMA plane)."),
    }


def course(scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    """Mean TTFT and TPOT over the run, in sixty parts, with what broke and what turned."""
    part_s = max(outcome.now, 1e-9) / 60
    ttft: dict[int, list[float]] = {}
    tpot: dict[int, list[float]] = {}
    for job in outcome.jobs:
        if job.finished_at is None or job.first_token_at is None:
            continue
        part = int(job.arrived_at / part_s)
        ttft.setdefault(part, []).append(job.first_token_at - job.arrived_at)
        if job.request.output_tokens > 1:
            seconds = job.finished_at - job.first_token_at
            tpot.setdefault(part, []).append(1e3 * seconds / (job.request.output_tokens - 1))
    figure, axes = _axes("minute of the trace at which requests arrived", "TTFT (s), mean")
    other = axes.twinx()
    other.spines[["top"]].set_visible(False)
    other.set_ylabel("TPOT (ms), mean", color=ROCE_COLOUR)
    axes.yaxis.label.set_color(UB_COLOUR)
    for on, found, colour in ((axes, ttft, UB_COLOUR), (other, tpot, ROCE_COLOUR)):
        parts = sorted(found)
        on.plot(
            [(p + 0.5) * part_s / 60 for p in parts],
            [sum(found[p]) / len(found[p]) for p in parts],
            color=colour,
        )
        on.set_ylim(bottom=0)
    for fault in scenario.faults_in_order:
        axes.axvline(fault.at_s / 60, color="#b3261e", lw=1)
        axes.annotate(str(fault), (fault.at_s / 60, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
                      textcoords="offset points", rotation=90, va="bottom", fontsize=8, color="#b3261e")  # fmt: skip
    for at, _ in outcome.role_changes:
        axes.axvline(at / 60, color="#9aa4b1", lw=0.8, ls=":")
    axes.set_title("simulated: how the run went", fontsize=10, loc="left")
    return {
        "name": "course",
        "title": "Over the run",
        "figure": figure,
        "note": "Red lines: what broke. Dotted lines: an instance was told to change sides.",
    }


def _axes(x: str, y: str, height: float = 4.0) -> tuple[Figure, Any]:
    matplotlib.rcParams["font.size"] = 10
    figure = Figure(figsize=(9, height), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color="#e6eaef")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
