"""`cloudmatrix bench grammar`: random schemas through a service of its own; what is kept, and what it costs."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.matrix.cores import default_threads
from app.models import catalogue


def grammar(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    schemas: Annotated[int, typer.Option(min=1, help="Random JSON schemas to ask for.")] = 200,
    tools: Annotated[bool, typer.Option(help="Hold answers to calls of random tools instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of the schemas.")] = 0,
    base_url: Annotated[str | None, typer.Option(help="A running service; none: one is started.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Share of answers that satisfy their schema, and how much slower they decode than free ones."""
    from contextlib import nullcontext

    from app.bench.grammar import bench_grammar, random_format, random_tools
    from app.bench.served import service

    served = service(model=model, threads=default_threads()) if base_url is None else nullcontext(base_url)
    with served as url, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("schemas", total=schemas)
        result = bench_grammar(
            url,
            model,
            schemas=schemas,
            seed=seed,
            shape=random_tools if tools else random_format,
            progress=lambda done, _total: bar.update(task, completed=done),
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table("figure", "value")
    for name, value in result.items():
        if name != "faults":
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
