"""`cloudmatrix bench reuse`: TTFT against the share of a prompt that another worker computed; a table and a plot."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.models import catalogue


def reuse(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    length: Annotated[
        list[int] | None, typer.Option(min=64, help="Prompt tokens; may be given again. None: 1024 and 2048.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=2, help="Prompts of each kind, of which the medians count.")] = 7,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Kernel threads; none: one a core, at most 8.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curve to this PNG.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Measure TTFT of prompts whose heads another worker computed before it was killed."""
    from app.bench.reuse import ReuseOptions, measure_reuse
    from app.bench.served import ServedError
    from app.matrix.cores import default_threads

    errors = Console(stderr=True)
    options = ReuseOptions(
        entry=catalogue.pull(model),
        lengths=length or (1024, 2048),
        repeat=repeat,
        threads=threads or default_threads(),
    )
    try:
        result = measure_reuse(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if plot is not None:
        _plot(result, plot)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table(
        "prompt", "reuse", "cached tokens", "requests", "TTFT, ms", "fetch, ms", "saved", "overhead"
    )
    for row in result["rows"]:
        fetch_s = row["phases_s"].get("fetch")
        table.add_row(
            str(row["prompt_tokens"]),
            "no pool" if row["reuse"] is None else f"{row['reuse']:.1%}",
            f"{row['cached_tokens']:.0f}",
            str(row["requests"]),
            f"{row['ttft_s'] * 1e3:.1f}",
            "–" if fetch_s is None else f"{fetch_s * 1e3:.1f}",
            "–" if not row["reuse"] else f"{row['saved']:.1%}",
            "–" if row["overhead"] is None else f"{row['overhead']:+.1%}",
        )
    Console().print(table)


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for length in sorted({row["prompt_tokens"] for row in result["rows"]}):
        rows = [r for r in result["rows"] if r["prompt_tokens"] == length and r["reuse"] is not None]
        line = axes.plot(
            [100 * r["reuse"] for r in rows],
            [1e3 * r["ttft_s"] for r in rows],
            "o-",
            label=f"{length} tokens",
        )[0]
        axes.fill_between(
            [100 * r["reuse"] for r in rows],
            [1e3 * r["ttft_s_quartiles"][0] for r in rows],
            [1e3 * r["ttft_s_quartiles"][1] for r in rows],
            alpha=0.2,
            color=line.get_color(),
        )
    axes.set(
        xlabel="share of the prompt from the pool, %", ylabel="TTFT, ms (median, quartiles)", ylim=(0, None)
    )
    axes.set_title("Time to first token when another worker computed the prompt's head")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
