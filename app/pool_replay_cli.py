"""`cloudmatrix pool replay`: what a small DRAM and a disk tier find of a real trace; a table and a plot."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.pool_door import AsJson


def replay(
    trace: Annotated[Path, typer.Argument(help="Mooncake JSONL: a request a line, with its `hash_ids`.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests from the beginning of the trace.")] = 1500,
    dram_share: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001, max=1.0, help="DRAM as a share of the trace's distinct blocks; may be given again."
        ),
    ] = None,
    disk_factor: Annotated[int, typer.Option(min=1, help="Disk as a multiple of DRAM.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Write the shares to this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Play a trace through a private Redis and disk tier: blocks found with DRAM alone, with disk, and at best."""
    from memory_pool.replay import ideal_share, num_distinct, read_chains, replay

    errors = Console(stderr=True)
    try:
        chains = read_chains(trace, requests)
    except (OSError, ValueError) as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if not chains:
        errors.print(f"Error: {trace} holds no request", style="red", markup=False)
        raise typer.Exit(1)
    distinct = num_distinct(chains)
    shares = sorted(set(dram_share or (0.05, 0.1, 0.2)))
    rows: list[dict[str, Any]] = []
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("requests", total=2 * len(shares) * len(chains))
        for share in shares:
            dram_blocks = max(1, round(share * distinct))
            found = {}
            for name, disk_blocks in (("dram", 0), ("dram_and_disk", dram_blocks * disk_factor)):
                found[name], wrong = replay(
                    chains,
                    dram_blocks=dram_blocks,
                    disk_blocks=disk_blocks,
                    played=lambda: progress.advance(task),
                )
                if wrong:
                    errors.print(f"Error: {wrong} blocks came back with other bytes", style="red")
                    raise typer.Exit(1)
            rows.append(
                {
                    "dram_share": share,
                    "dram_blocks": dram_blocks,
                    "disk_blocks": dram_blocks * disk_factor,
                    **found,
                }
            )
    result = {
        "trace": trace.name,
        "requests": len(chains),
        "blocks": sum(len(chain) for chain in chains),
        "distinct_blocks": distinct,
        "ideal": ideal_share(chains),
        "wrong": 0,
        "rows": rows,
    }
    if plot is not None:
        _plot(result, plot)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table("DRAM, blocks", "trace / DRAM", "disk, blocks", "found, DRAM alone", "DRAM + disk", "ideal")
    for row in result["rows"]:
        table.add_row(
            f"{row['dram_blocks']:,}",
            f"{result['distinct_blocks'] / row['dram_blocks']:.1f}",
            f"{row['disk_blocks']:,}",
            f"{row['dram']:.1%}",
            f"{row['dram_and_disk']:.1%}",
            f"{result['ideal']:.1%}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{result['requests']:,} requests of {result['trace']}, {result['blocks']:,} blocks, "
        f"{result['distinct_blocks']:,} of them distinct. Real Redis and disk tier, blocks scaled down; every block "
        "found was compared. Ideal: a cache that loses nothing."
    )


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    at = range(len(result["rows"]))
    kinds = (("dram", "DRAM alone", -0.2), ("dram_and_disk", "DRAM + disk", 0.2))
    for name, label, offset in kinds:
        bars = axes.bar(
            [x + offset for x in at], [100 * row[name] for row in result["rows"]], 0.4, label=label
        )
        axes.bar_label(bars, fmt="%.1f")
    axes.axhline(100 * result["ideal"], color="black", linestyle="--", linewidth=1, label="infinite cache")
    axes.set_xticks(
        list(at), [f"1 : {result['distinct_blocks'] / row['dram_blocks']:.0f}" for row in result["rows"]]
    )
    axes.set(
        xlabel="DRAM : distinct blocks of the trace",
        ylabel="prompt blocks found, %",
        ylim=(0, 118 * result["ideal"]),
    )
    axes.set_title(
        f"{result['requests']:,} requests of {result['trace']} through the real tiers", fontsize=10
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
