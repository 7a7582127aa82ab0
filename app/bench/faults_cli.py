"""`cloudmatrix bench faults`: what faults of the pool do to the answers of a service under load."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.models import catalogue


def faults(
    fault: Annotated[
        list[str] | None,
        typer.Option(help="One by name, e.g. 'redis killed'; may be given again. None: all."),
    ] = None,
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(min=8, help="Requests of each run.")] = 48,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 6,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Kernel threads; none: one a core, at most 8.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Hurt the pool of a service under load and compare every answer with those before."""
    from app.bench.fault_kinds import FAULTS
    from app.bench.faults import FaultsOptions, measure_faults
    from app.bench.served import ServedError
    from app.matrix.cores import default_threads

    errors = Console(stderr=True)
    for name in fault or ():
        if name not in FAULTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(FAULTS)}", param_hint="--fault")
    options = FaultsOptions(
        entry=catalogue.pull(model),
        requests=requests,
        concurrency=concurrency,
        faults=[FAULTS[name] for name in fault or FAULTS],
        threads=threads or default_threads(),
    )
    try:
        result = measure_faults(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)
    if any(row["wrong"] or row["failed"] for row in result["rows"]):
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    table = Table("fault", "requests", "wrong", "failed", "p50, ms", "slowdown", "slowest, s", "what it left")
    for row in result["rows"]:
        table.add_row(
            row["fault"],
            str(row["requests"]),
            str(row["wrong"]),
            str(row["failed"]),
            f"{row['p50_s'] * 1e3:.0f}",
            f"{row['slowdown']:.2f} x",
            f"{row['slowest_s']:.1f}",
            row["trace"],
        )
    Console().print(table)
