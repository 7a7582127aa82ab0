"""`cloudmatrix models`: which models are here, and how to get more."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.models import catalogue

models_app = typer.Typer(help="The models of this machine.", no_args_is_help=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@models_app.command("list")
def list_models(as_json: JsonFlag = False) -> None:
    """Show the models that are here and those that can be pulled."""
    _show(catalogue.public_list(), as_json)


@models_app.command()
def pull(name: str, as_json: JsonFlag = False) -> None:
    """Fetch a model of the catalogue, unless it is here already."""
    _show([catalogue.pull(name).public()], as_json)


@models_app.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[
        Path, typer.Argument(help="A Llama-architecture GGUF file, or a folder with safetensors.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Take in a model of yours where it lies."""
    _show([catalogue.add(name, path).public()], as_json)


def _show(models: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"models": models}))
        return
    table = Table("model", "architecture", "parameters", "weights", "quantization", "path")
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    for model in models:
        weights = f"{model['weights_bytes'] / 1e6:,.0f} MB"
        path = model["path"] or "not fetched yet: models pull"
        parameters = f"{model['parameters'] / 1e6:,.1f} M"
        table.add_row(model["id"], model["architecture"], parameters, weights, model["quantization"], path)
    Console().print(table)
