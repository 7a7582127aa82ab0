"""One self-contained HTML page: error table, throughput against latency, hit ratio against pool size, link
load.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from app.twin import deepseek as r1
from app.twin.errors import TwinError
from app.twin.linkload import node_to_l2_load
from app.twin.machine import SupernodeMachine
from app.twin.outcome import Outcome
from app.twin.pool import hit_curve
from app.twin.predict import predict
from app.twin.replay import deployment
from app.twin.scenario import Scenario
from app.twin.simulator import Simulator
from app.twin.trace import BLOCK_TOKENS, Request
from app.twin.validate import validate

BATCHES = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
POOL_TB = (0.05, 0.1, 0.25, 0.5, 0.75, 1.08, 1.5, 2, 3, 4, 6, 8)
UB_COLOUR, ROCE_COLOUR = "#1f5fa8", "#c8641b"


def write_report(path: Path, scenario: Scenario, requests: Sequence[Request] | None) -> None:
    """Write the page. Raises `TwinError` when the file cannot be written."""
    figures = [_pareto(scenario)]
    hit_share = None
    if requests is not None:
        outcome = Simulator(SupernodeMachine(scenario), deployment(scenario)).run(requests)
        hit_share = outcome.hit_tokens / outcome.prompt_tokens
        figures += [_hits(requests), _heat(scenario, outcome)]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.jinja")
    validation = validate()
    for row in validation["rows"]:
        row["reason"] = ""
    page = template.render(
        model=scenario.model,
        num_npus=scenario.num_npus,
        validation=validation,
        point=predict(scenario),
        hit_share=hit_share,
        figures=figures,
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TwinError(f"report {path}: {error}") from None


def pareto(scenario: Scenario) -> list[tuple[float, float, float]]:
    """(batch per NPU, TPOT in seconds, decode tokens/s per NPU) for every batch that fits."""
    points = []
    for batch in BATCHES:
        if batch <= scenario.max_sequences_per_npu:
            tpot_s = scenario.decode_point(batch).tpot_s(scenario.mtp_acceptance)
            points.append((float(batch), tpot_s, batch / tpot_s))
    return points


def _pareto(scenario: Scenario) -> dict[str, str]:
    figure, axes = _axes("TPOT (ms)", "decode tokens/s per NPU")
    for plane, colour in (("ub", UB_COLOUR), ("roce", ROCE_COLOUR)):
        points = pareto(replace(scenario, plane=plane))
        axes.plot(
            [1e3 * p[1] for p in points],
            [p[2] for p in points],
            "o-",
            color=colour,
            label={"ub": "UB", "roce": "RoCE"}[plane],
            ms=4,
        )
        for batch, tpot_s, rate in points[2::3]:
            axes.annotate(
                f"{batch:g}", (1e3 * tpot_s, rate), textcoords="offset points", xytext=(4, -10), fontsize=8
            )
    for slo_ms in (15, 30, 50):
        axes.axvline(slo_ms, color="#9aa4b1", lw=0.8, ls="--")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    context = f"{scenario.prompt_tokens} + {scenario.output_tokens} tokens, EP{scenario.decode_ep}"
    return {
        "title": "Throughput against latency",
        "png": _png(figure),
        "note": f"Decode with {context}; numbers at the points are batch per NPU, dashed lines the SLOs of 15, 30 and "
        "50 ms. The RoCE curve moves expert traffic over 200 Gbps per die.",
    }


def _hits(requests: Sequence[Request]) -> dict[str, str]:
    figure, axes = _axes("pool size (TB)", "prompt tokens found (%)")
    curve = hit_curve(requests, r1.KV_BYTES_PER_TOKEN * BLOCK_TOKENS, [tb * 1e12 for tb in POOL_TB])
    axes.plot([c / 1e12 for c, _ in curve], [100 * share for _, share in curve], "o-", color=UB_COLOUR, ms=4)
    axes.set_xscale("log")
    axes.set_xticks(POOL_TB, [f"{tb:g}" for tb in POOL_TB])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    return {
        "title": "Hit ratio against pool size",
        "png": _png(figure),
        "note": f"{len(requests):,} requests of the trace, LRU, blocks of {BLOCK_TOKENS} tokens at "
        f"{r1.KV_BYTES_PER_TOKEN:,} B of KV per token.",
    }


def _heat(scenario: Scenario, outcome: Outcome) -> dict[str, str]:
    load = node_to_l2_load(scenario, outcome)
    figure, axes = _axes("node", "UB sub-plane", height=3.2)
    image = axes.imshow(
        [[100 * value for value in row] for row in load],
        aspect="auto",
        cmap="YlOrRd",
        vmin=0,
        interpolation="nearest",
    )
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="mean load of L1 uplinks (%)")
    return {
        "title": "Link heat map",
        "png": _png(figure),
        "note": "Mean use over the run of each L1 chip's uplinks to its L2 chips: expert exchange of busy instances, "
        "blocks from and to the pool. KV handover runs on the RDMA plane and is not in it.",
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


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
