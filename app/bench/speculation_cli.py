"""`cloudmatrix bench speculation`: what guessing ahead gains where answers repeat prompts, and costs elsewhere."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.models import catalogue


def speculation(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at a time; may be given again. None: 1 and 4.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 160,
    repeat: Annotated[int, typer.Option(min=1, help="Turns of each prompt on both sides.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Kernel threads; none: one a core, at most 8.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Compare decoding with and without speculation; the answers must be the same."""
    from app.bench.served import ServedError
    from app.bench.speculation import SpeculationOptions, measure_speculation
    from app.matrix.cores import default_threads

    errors = Console(stderr=True)
    options = SpeculationOptions(
        entry=catalogue.pull(model),
        concurrency=concurrency or (1, 4),
        output_tokens=output_tokens,
        repeat=repeat,
        threads=threads or default_threads(),
    )
    try:
        result = measure_speculation(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table("at once", "prompts", "sampling", "tokens", "tok/s with", "without", "ratio", "aim")
    for row in result["rows"]:
        style = "green" if row["ratio"] >= row["aim"] else "yellow"
        table.add_row(
            str(row["concurrency"]),
            row["kind"],
            row["sampling"],
            str(row["output_tokens"]),
            f"{row['tokens_per_s_with']:.0f}",
            f"{row['tokens_per_s_without']:.0f}",
            f"[{style}]{row['ratio']:.2f} x[/]",
            f"{row['aim']:.2f} x",
        )
    Console().print(table)
