"""`cloudmatrix bench vanish`: the test's flags and its table."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.matrix.cores import default_threads
from app.models import catalogue


def vanish(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    streams: Annotated[int, typer.Option(min=1, help="Streaming requests.")] = 500,
    concurrency: Annotated[int, typer.Option(min=1, help="How many at a time.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = default_threads(),
    seed: Annotated[int, typer.Option(help="Of prompts and chance.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Clients vanish at random; is everything returned, and is the ledger what was produced? Exit 1 if not."""
    from app.bench.served import ServedError
    from app.bench.vanish import VanishOptions, run_vanish

    errors = Console(stderr=True)
    options = VanishOptions(
        entry=catalogue.pull(model),
        streams=streams,
        concurrency=concurrency,
        max_tokens=max_tokens,
        threads=threads,
        seed=seed,
    )
    try:
        result = run_vanish(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)
    if not result["ok"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    console = Console()
    ends = ", ".join(f"{number} {how}" for how, number in result["ends"].items())
    console.print(f"{result['streams']} streams in {result['seconds']:.0f} s: {ends}")
    table = Table("what", "expected", "found", "")
    for check in result["checks"]:
        mark = "ok" if check["holds"] else "WRONG"
        table.add_row(check["what"], f"{check['expected']:,}", f"{check['found']:,}", mark)
    console.print(table)
    lapsed = result["lapsed_leases"]
    console.print(
        f"all returned {result['settled_s']:.1f} s after the last client left"
        + (f"; {lapsed} leases on blocks were not released but ran out" if lapsed else "")
    )
