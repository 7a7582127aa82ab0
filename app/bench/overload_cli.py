"""`cloudmatrix bench overload`: the measurement's flags and its table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def overload(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = "smollm2-135m",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt, all of them new.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    slo_ttft: Annotated[float, typer.Option(min=0.01, help="Objective, seconds.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(min=0.001, help="Objective, seconds.")] = 0.1,
    first_rate: Annotated[float, typer.Option(min=0.1, help="Requests/s at which the ramp begins.")] = 8.0,
    ramp: Annotated[float, typer.Option(min=1, help="Seconds of each rate of the ramp.")] = 12.0,
    peak: Annotated[
        float, typer.Option(min=1, help="Seconds of each measurement of the peak, four in all.")
    ] = 18.0,
    factor: Annotated[float, typer.Option(min=1, help="How many times the peak arrives.")] = 5.0,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of overload.")] = 60.0,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write a picture (PNG).")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Goodput within the objectives when several times as much arrives as can be served."""
    from app.bench.overload import OverloadOptions, plot, run_overload
    from app.bench.served import ServedError
    from app.models import catalogue

    errors = Console(stderr=True)
    options = OverloadOptions(
        entry=catalogue.pull(model),
        threads=threads,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        first_rate=first_rate,
        ramp_s=ramp,
        peak_s=peak,
        factor=factor,
        duration_s=duration,
    )
    try:
        result = run_overload(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if plot_to is not None:
        plot(result, plot_to)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table("arrive/s", "goodput/s", "completed", "429/503", "broken", "TTFT p99", "TPOT p99")
    before, after = result["beside"][:2], result["beside"][2:]
    for row in [*result["ramp"], *before, result["overload"], *after]:
        latencies = [
            "-" if row[name] is None else f"{row[name] * 1000:.0f} ms"
            for name in ("ttft_p99_s", "tpot_p99_s")
        ]
        counts = [str(row[name]) for name in ("completed", "refused", "broken")]
        table.add_row(f"{row['rate']:.1f}", f"{row['goodput_per_s']:.2f}", *counts, *latencies)
    console = Console()
    console.print(table)
    console.print(
        f"kept {result['kept']:.1%} of the peak goodput of {result['peak_goodput_per_s']:.2f} requests/s "
        f"({result['kept_of_best_step']:.1%} of the ramp's best step)"
    )
