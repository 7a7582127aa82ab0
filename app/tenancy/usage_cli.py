"""`cloudmatrix usage`: sums over the ledger, as a table, CSV or JSON."""

import csv
import io
import json
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.errors import InvalidRequestError
from app.tenancy.door import DATA_DIR, AsJson, DatabaseUrl, DataDir, Door, Pepper
from app.tenancy.usage import groups_of
from app.tenancy.usage import usage as sum_up

Day = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"])]
NUMBERS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")


def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    since: Day = None,
    until: Day = None,
    by: Annotated[
        str, typer.Option(help="Of tenant, user, key, model, day, endpoint, status; comma-separated.")
    ] = "tenant,model,day",
    data_dir: DataDir = DATA_DIR,
    database: DatabaseUrl = None,
    pepper: Pepper = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: AsJson = False,
) -> None:
    """What was used, from the ledger: requests, tokens and cost. Days are UTC, and both ends count."""
    try:
        groups = groups_of(by)
    except InvalidRequestError as error:
        raise typer.BadParameter(str(error), param_hint="--by") from None
    rows = Door(data_dir, database, pepper).read(
        lambda opened, _: sum_up(
            opened,
            groups,
            first_day=since.strftime("%Y-%m-%d") if since else None,
            last_day=until.strftime("%Y-%m-%d") if until else None,
            tenant=tenant,
            model=model,
        )
    )
    columns = [*groups, *NUMBERS]
    if as_json:
        typer.echo(json.dumps({"usage": rows}))
    elif as_csv:
        written = io.StringIO()
        writer = csv.DictWriter(written, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        typer.echo(written.getvalue(), nl=False)
    else:
        table = Table(*(column.replace("_", " ") for column in columns))
        for row in rows:
            table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
        Console().print(table)
