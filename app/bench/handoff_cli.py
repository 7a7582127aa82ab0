"""`cloudmatrix bench handoff`: what prefill and decode on two workers cost the first tokens, beside one worker."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.models import catalogue


def handoff(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = catalogue.DEFAULT_MODEL,
    length: Annotated[int, typer.Option(min=64, help="Prompt tokens.")] = 1024,
    repeat: Annotated[int, typer.Option(min=2, help="Prompts, of which the medians count.")] = 21,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Kernel threads of each worker; none: one a core, at most 8.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Measure TTFT and the time to the second token with and without a handoff between two workers."""
    from app.bench.handoff import HandoffOptions, measure_handoff
    from app.bench.served import ServedError
    from app.matrix.cores import default_threads

    errors = Console(stderr=True)
    options = HandoffOptions(
        entry=catalogue.pull(model), length=length, repeat=repeat, threads=threads or default_threads()
    )
    try:
        result = measure_handoff(options, lambda line: errors.print(line, style="dim"))
    except ServedError as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table("workers", "TTFT, ms", "to 2nd token, ms", "each further, ms", "in the workers, ms")
    for which, name in (("together", "1 both"), ("apart", "1 prefill + 1 decode")):
        row = result["rows"][which]
        phases = ", ".join(f"{phase} {_ms(value)}" for phase, value in row["phases_s"].items())
        table.add_row(name, _ms(row["ttft_s"]), _ms(row["second_token_s"]), _ms(row["tpot_s"]), phases)
    table.add_row(
        "added by the handoff", _percent(result["ttft_overhead"]), _percent(result["second_token_overhead"])
    )
    console = Console()
    console.print(table)
    console.print(
        f"{result['requests']} prompts of {result['prompt_tokens']} tokens, each to both services in turn; medians, "
        "of the pairs' ratios where it is %; all answers were equal. TTFT ends with the first text, which the prefill "
        "worker emits."
    )


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:+.1%}"
