"""`cloudmatrix bench load`: the load test's flags, progress bar and table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.bench.load import LoadOptions, run_load


def load(
    base_url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="The model to ask for.")] = "smollm2-135m",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, in a closed loop.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="How many requests to send.")] = 64,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with messages, prompt or turns; or one question a line.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: Poisson arrivals a second.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Replay a Mooncake JSONL or Azure CSV trace at its own times.")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Replay this many times as fast.")] = 1.0,
    slo_ttft: Annotated[float | None, typer.Option(min=0, help="Objective for goodput, seconds.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(min=0, help="Objective for goodput, seconds.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="CLOUDMATRIX_API_KEY", help="Bearer key, if the server wants one.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Make every answer --max-tokens long.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request failed.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Load-test an OpenAI-compatible server with streaming requests."""
    options = LoadOptions(
        base_url=base_url,
        model=model,
        concurrency=concurrency,
        requests=requests,
        prompts=prompts,
        max_tokens=max_tokens,
        rate=rate,
        trace=trace,
        speed=speed,
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        api_key=api_key,
        temperature=temperature,
        ignore_eos=ignore_eos,
        timeout_s=timeout,
        seed=seed,
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        refresh_per_second=2,  # the bar must not take the processor from what it measures
    )
    try:
        with bar:
            task = bar.add_task("requests", total=requests, failed=0)
            result = run_load(options, lambda ended, failed: bar.update(task, completed=ended, failed=failed))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)
    if result["failed"]:
        raise typer.Exit(2)


def _show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("", "p50", "p90", "p99", "mean")
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        values = [result[name][column] for column in ("p50", "p90", "p99", "mean")]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    console.print(f"tpot_s = {result['tpot_formula']}")
    share = result["cached_token_share"]
    console.print(
        f"{result['completed']} completed, {result['failed']} failed in {result['duration_s']:.2f} s; "
        f"{result['output_tokens_per_s']:.1f} output and {result['total_tokens_per_s']:.1f} total tokens/s; "
        f"goodput {result['goodput_requests_per_s']:.2f} requests/s; "
        f"cached prompt tokens {'unknown' if share is None else f'{share:.1%}'}"
    )
    for message, times in result["errors"].items():
        console.print(f"{times} x {message}", style="red")
