"""`cloudmatrix bench interference`: its flags and its table."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.matrix.cores import default_threads
from app.models import catalogue


def interference(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Kernel threads of a worker; none: one a core, at most 8.")
    ] = None,
    both: Annotated[bool, typer.Option(help="One worker that does both, instead of 1 + 1.")] = False,
    streams: Annotated[int, typer.Option(min=1, help="Answers that run at a time.")] = 8,
    output_tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 384,
    long_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts that arrive.")] = 2000,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two of them.")] = 1.0,
    repeat: Annotated[int, typer.Option(min=1, help="Alternations, of which the medians count.")] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Measure TPOT while long prompts arrive, against TPOT without them, on a service of its own."""
    from app.bench.interference import InterferenceOptions, run_interference
    from app.bench.served import ServedError

    errors = Console(stderr=True)
    options = InterferenceOptions(
        model=model,
        threads=threads or default_threads(),
        num_streams=streams,
        output_tokens=output_tokens,
        long_tokens=long_tokens,
        every_s=every,
        repeat=repeat,
        more=("--prefill", "0", "--decode", "0", "--both", "1") if both else (),
    )
    catalogue.pull(model)
    try:
        result = run_interference(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    beside = f"a {result['long_tokens']:,}-token prompt each {result['every_s']:g} s"
    table = Table("medians of the alternations", "alone", beside)
    alone, disturbed = result["alone"], result["disturbed"]
    for name, label, unit in (
        ("tpot_p50_s", "TPOT p50", 1e3),
        ("tpot_p99_s", "TPOT p99", 1e3),
        ("itl_p99_s", "time between tokens, p99", 1e3),
        ("long_ttft_p50_s", "TTFT p50 of the long prompts", 1.0),
    ):
        cells = ["–" if side[name] is None else f"{side[name] * unit:.2f}" for side in (alone, disturbed)]
        table.add_row(f"{label}, {'ms' if unit > 1 else 's'}", *cells)
    console = Console()
    console.print(table)
    verdict = "met" if result["ratio"] <= result["limit"] else "missed"
    console.print(
        f"TPOT p99 with long prompts / without: {result['ratio']:.2f} (median of {result['repeat']} alternations; "
        f"limit {result['limit']:g}: {verdict}), {result['streams']} streams of {result['output_tokens']} tokens"
    )
