"""`cloudmatrix bench engine`: the engine alone, in one process, batch 1, greedy, beside what the machine allows."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.matrix.cores import default_threads
from app.models import catalogue


def engine(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Kernel threads; none: one a core, at most 8.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Runs, of which the medians count.")] = 5,
    kernels: Annotated[str, typer.Option(help="auto, or a kernel set by name, e.g. portable.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Measure prefill and decode of the engine alone, and the machine's limits beside them."""
    from app.bench.engine import bench_engine

    entry = catalogue.pull(model)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        result = bench_engine(
            entry.path,
            num_threads=threads or default_threads(),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            repeat=repeat,
            kernels=kernels,
            progress=lambda done, total, label: bar.update(
                task, completed=done, total=total, description=label
            ),
        )
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table("figure", "value")
    for name, value in result.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                table.add_row(f"{name}.{inner}", _text(number))
        elif not isinstance(value, list):
            table.add_row(name, _text(value))
    Console().print(table)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
