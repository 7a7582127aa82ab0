"""`cloudmatrix prices`: what a million tokens of each model cost."""

import json
from decimal import Decimal, InvalidOperation
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.tenancy import shown
from app.tenancy.door import DATA_DIR, AsJson, DatabaseUrl, DataDir, Door, Pepper, Redis
from app.tenancy.prices import Price, to_nano
from app.tenancy.registry import Registry

prices_app = typer.Typer(help="Prices of a million tokens, by model.", no_args_is_help=True)

Amount = Annotated[str, typer.Option(help="Of a million tokens, in your currency: 0.15")]


@prices_app.command("list")
def list_prices(
    data_dir: DataDir = DATA_DIR, database: DatabaseUrl = None, pepper: Pepper = None, as_json: AsJson = False
) -> None:
    """All prices. Models without one cost nothing."""
    prices = Door(data_dir, database, pepper).read(lambda _, registry: registry.prices())
    found = {model: shown.price(price) for model, price in prices.items()}
    if as_json:
        typer.echo(json.dumps({"prices": found}))
        return
    table = Table("model", "input", "cached input", "output", title="for a million tokens")
    for model, price in found.items():
        table.add_row(model, price["input"], price["cached_input"], price["output"])
    Console().print(table)


@prices_app.command("set")
def set_price(
    model: str,
    input_: Annotated[str, typer.Option("--input", help="Of a million prompt tokens: 0.15")],
    output: Amount,
    cached_input: Annotated[
        str | None, typer.Option(help="Of those whose KV was found cached; none: as --input.")
    ] = None,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """Set a model's prices, on every running gateway at once. Requests that ended keep theirs."""
    price = Price(
        nano(input_, "--input"),
        nano(input_ if cached_input is None else cached_input, "--cached-input"),
        nano(output, "--output"),
    )

    async def put(registry: Registry) -> None:
        await registry.set_price(model, price)

    Door(data_dir, database, pepper, redis).change(put)
    typer.echo(json.dumps({"model": model, **shown.price(price)}))


@prices_app.command()
def delete(
    model: str,
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    redis: Redis = None,
) -> None:
    """From now on requests to the model cost nothing; those that ended keep their price."""

    async def drop(registry: Registry) -> None:
        await registry.delete_price(model)

    Door(data_dir, database, pepper, redis).change(drop)
    typer.echo(json.dumps({"model": model, "deleted": True}))


def nano(amount: str, option: str) -> int:
    """An amount of money as an `option` was given it. Raises typer.BadParameter."""
    try:
        money = Decimal(amount)
    except InvalidOperation:
        money = Decimal(-1)
    if not 0 <= money <= 1_000_000:
        raise typer.BadParameter("expected an amount from 0 to 1000000, such as 12.50", param_hint=option)
    return to_nano(money)
