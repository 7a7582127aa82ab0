"""The comparison as a Markdown table and a plot."""

import textwrap
from pathlib import Path
from typing import Any

from app.bench.peers import OURS

LABELS = {
    OURS: "cloudmatrix",
    "openvino-genai": "OpenVINO GenAI",
    "xllamacpp": "llama.cpp (prebuilt xllamacpp)",
    "xllamacpp-q4_0": "llama.cpp (Q4_0: damaged)",
}
COLOURS = {OURS: "#c7402d", "openvino-genai": "#4c6f91", "xllamacpp": "#9aa7b1", "xllamacpp-q4_0": "#c9d1d6"}


def to_markdown(result: dict[str, Any]) -> str:
    """The tables of a run, with date and machine."""
    about = result["machine"]
    versions = ", ".join(f"{LABELS[name]} {version}" for name, version in result["versions"].items())
    lines = [
        (
            f"Measured {result['date']} on {about['cpu']}, {about['cores']} cores ({', '.join(about['flags'])}), "
            f"{result['threads']} threads each side, {result['model']}, sides in turns, medians of "
            f"{result['engine_turns']} turns of one request and {result['repeat']} of the service. "
            f"Peers: {versions}."
        ),
        "",
        "| engine, one greedy request | prefill 512, tokens/s | ours / theirs | decode 128, tokens/s | ours / theirs |",
        "|---|---:|---:|---:|---:|",
    ]
    ours = result["engine"][OURS]
    for name, row in result["engine"].items():
        cells = []
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            cells += [f"{row[key]:.0f}", "" if name == OURS else f"{ours[key] / row[key]:.2f} ×"]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        "| 16 users, 256-token prompts sharing 192, 64 out | output tokens/s | ours / theirs | TTFT p50 | TPOT p50 |",
        "|---|---:|---:|---:|---:|",
    ]
    ways = {
        OURS: "whole service, HTTP",
        "openvino-genai": "in process, no HTTP",
        "xllamacpp": "HTTP, 16 slots",
    }
    ours = result["served"][OURS]
    for name, row in result["served"].items():
        speed = row["output_tokens_per_s"]
        ratio = "" if name == OURS else f"{ours['output_tokens_per_s'] / speed:.2f} ×"
        lines.append(
            f"| {LABELS[name]}, {ways[name]} | {speed:.0f} | {ratio} | {row['ttft_s']:.3f} s | "
            f"{row['tpot_s'] * 1e3:.1f} ms |"
        )
    lines.append("")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second, one group a measure; a taller bar is better."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("Prefill, 512 tokens, batch 1", "engine", "prefill_tokens_per_s"),
        ("Decode, 128 tokens, batch 1", "engine", "decode_tokens_per_s"),
        ("Served, 16 users at once", "served", "output_tokens_per_s"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.6), layout="constrained")
    for axis, (title, part, key) in zip(axes, panels, strict=True):
        names = list(result[part])
        values = [result[part][name][key] for name in names]
        bars = axis.bar(range(len(names)), values, color=[COLOURS[name] for name in names])
        axis.bar_label(bars, fmt="{:,.0f}", padding=2)
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(len(names)), [textwrap.fill(LABELS[name], 12) for name in names], fontsize=7.5)
        axis.set_ylim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("tokens per second")
    about = result["machine"]
    figure.suptitle(
        f"{result['model']}, {result['threads']} threads, {about['cpu']} ({about['cores']} cores), {result['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
