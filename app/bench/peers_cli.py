"""`cloudmatrix bench peers`: the comparison's flags and files."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def peers(
    peer_python: Annotated[
        list[Path],
        typer.Option(help="An interpreter that has openvino-genai or xllamacpp; may be given again."),
    ],
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = "smollm2-135m",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = 2,
    repeat: Annotated[
        int,
        typer.Option(
            min=1,
            help="Turns of the service, of which the medians count; of one request three times as many.",
        ),
    ] = 5,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables into this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison into this PNG file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Compare with other engines on the same file and machine, in turns in one run."""
    from app.bench.peer_process import PeerError
    from app.bench.peer_report import draw, to_markdown
    from app.bench.peers import PeersOptions, run_peers
    from app.bench.served import ServedError
    from app.models import catalogue

    errors = Console(stderr=True)
    options = PeersOptions(pythons=peer_python, entry=catalogue.pull(model), threads=threads, repeat=repeat)
    try:
        result = run_peers(options, lambda line: errors.print(line, style="dim"))
    except (PeerError, ServedError, ValueError) as error:
        errors.print(f"Error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    for path in filter(None, (markdown, plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if markdown is not None:
        markdown.write_text(to_markdown(result), encoding="utf-8")
    if plot is not None:
        draw(result, plot)
    typer.echo(json.dumps(result) if as_json else to_markdown(result))
