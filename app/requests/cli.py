"""`cloudmatrix requests …`: what becomes of request logs."""

import json
from pathlib import Path
from typing import Annotated

import typer

requests_app = typer.Typer(help="Request logs (`up --request-log FILE`).", no_args_is_help=True)


@requests_app.callback()
def requests() -> None:
    """Request logs (`up --request-log FILE`)."""


@requests_app.command()
def export(
    logs: Annotated[
        list[Path], typer.Argument(help="Request logs: of several gateways, and older parts (FILE.1, …).")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to; none: standard output.")] = None,
    mooncake: Annotated[bool, typer.Option("--mooncake", help="As a Mooncake trace.")] = False,
) -> None:
    """Make a trace for `twin replay --trace` and `bench load --trace` of what was served."""
    from app.requests.mooncake import RequestLogError, mooncake_lines, read_log

    if not mooncake:
        raise typer.BadParameter("name the format: --mooncake is the one there is", param_hint="--mooncake")
    try:
        lines = [json.dumps(line) for line in mooncake_lines(read_log(logs))]
    except RequestLogError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    if not lines:
        typer.secho("Error: no request in these logs made a token", fg="red", err=True)
        raise typer.Exit(1)
    text = "\n".join(lines) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"{len(lines)} requests in {out}", err=True)
