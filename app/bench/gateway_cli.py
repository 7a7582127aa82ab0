"""`cloudmatrix bench gateway`: the measurement's flags and its table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def gateway(
    litellm: Annotated[
        Path | None, typer.Option(help="An interpreter that has litellm[proxy], to measure it beside.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Alternating repeats, of which the medians count.")] = 3,
    requests: Annotated[int, typer.Option(min=10, help="Whole answers a repeat.")] = 600,
    streams: Annotated[int, typer.Option(min=10, help="Streams a repeat.")] = 128,
    stream_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a stream.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """What the gateway itself costs: requests and chunks a second on one core, and the latency it adds."""
    from app.bench.gateway import GatewayBenchError, GatewayOptions, run_gateway
    from app.models import catalogue

    errors = Console(stderr=True)
    options = GatewayOptions(
        litellm=litellm,
        repeat=repeat,
        requests=requests,
        streams=streams,
        stream_tokens=stream_tokens,
        concurrency=concurrency,
    )
    catalogue.pull("smollm2-135m")
    try:
        result = run_gateway(options, lambda line: errors.print(line, style="dim"))
    except GatewayBenchError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("", "requests/s", "chunks/s", "p50 through", "p50 past it", "added")
    for name, side in result["sides"].items():
        milliseconds = [
            f"{side[key] * 1000:.2f} ms" for key in ("latency_s", "direct_latency_s", "added_latency_s")
        ]
        table.add_row(name, f"{side['requests_per_s']:.0f}", f"{side['chunks_per_s']:.0f}", *milliseconds)
    if result["ratio"] is not None:
        ratio = result["ratio"]
        table.add_row("ratio", f"{ratio['requests_per_s']:.1f} x", f"{ratio['chunks_per_s']:.1f} x")
    console.print(table)
    if not result["pinned"]:
        console.print("One core only: the load client ran on the gateway's core.", style="yellow")
