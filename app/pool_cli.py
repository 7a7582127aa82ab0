"""`cloudmatrix pool`: what the memory pool holds, quotas, and throwing a namespace out."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from memory_pool.admin import PoolAdmin
from memory_pool.store import StoreError

pool_app = typer.Typer(help="The memory pool of a running service.", no_args_is_help=True)

Redis = Annotated[
    str | None,
    typer.Option(
        envvar="CLOUDMATRIX_REDIS", help="The pool's Redis; none: that of the service in --data-dir."
    ),
]
DataDir = Annotated[Path, typer.Option(envvar="CLOUDMATRIX_DATA_DIR", help="The service's data folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Namespace = Annotated[str, typer.Argument(help="The namespace, as `pool stats` lists it.")]

_DATA_DIR = Path("~/.local/share/cloudmatrix")


@pool_app.command()
def stats(redis: Redis = None, data_dir: DataDir = _DATA_DIR, as_json: AsJson = False) -> None:
    """Blocks, bytes, hits and evictions, by tier and namespace."""
    with _admin(redis, data_dir) as admin:
        found = admin.stats()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for title in ("tiers", "namespaces"):
        for name, row in found[title].items():
            typer.echo(f"{title.removesuffix('s')} {name}")
            for what, value in row.items():
                typer.echo(f"  {what:<16} {_cell(value)}")


@pool_app.command()
def inspect(
    namespace: Namespace,
    most: Annotated[int, typer.Option(min=1, help="How many blocks to list.")] = 100,
    redis: Redis = None,
    data_dir: DataDir = _DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """The blocks of a namespace: names and sizes, never what they say."""
    with _admin(redis, data_dir) as admin:
        blocks = admin.inspect(namespace, most=most)
    if as_json:
        typer.echo(json.dumps({"namespace": namespace, "blocks": blocks}))
        return
    for block in blocks:
        where = " ".join(
            tier for tier, there in (("dram", block["in_dram"]), ("disk", block["on_disk"])) if there
        )
        typer.echo(f"{block['key']}  {block['num_bytes']:>12,} B  {where or 'nowhere'}")


@pool_app.command()
def purge(
    namespace: Namespace, redis: Redis = None, data_dir: DataDir = _DATA_DIR, as_json: AsJson = False
) -> None:
    """Remove a namespace's blocks from DRAM and disk."""
    with _admin(redis, data_dir) as admin:
        removed = admin.purge(namespace)
    typer.echo(
        json.dumps({"namespace": namespace, "removed": removed}) if as_json else f"{removed} blocks removed"
    )


@pool_app.command()
def quota(
    namespace: Namespace,
    num_bytes: Annotated[int | None, typer.Argument(help="The limit in bytes; none: lift it.")] = None,
    redis: Redis = None,
    data_dir: DataDir = _DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Limit the bytes of a namespace."""
    with _admin(redis, data_dir) as admin:
        admin.set_quota(namespace, num_bytes)
    limit = "no quota" if num_bytes is None else f"{num_bytes:,} B"
    typer.echo(
        json.dumps({"namespace": namespace, "quota_bytes": num_bytes}) if as_json else f"{namespace}: {limit}"
    )


@contextlib.contextmanager
def _admin(redis: str | None, data_dir: Path) -> Iterator[PoolAdmin]:
    folder = data_dir.expanduser()
    noted = folder / "redis" / "url"
    try:
        if redis is None and not noted.exists():
            raise ValueError(f"no service runs in {folder}: start one, or give its Redis with --redis URL")
        with contextlib.closing(PoolAdmin(redis or noted.read_text(), disk_folder=folder / "kv")) as admin:
            yield admin
    except (ValueError, StoreError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={count}" for name, count in value.items() if count) or "-"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
