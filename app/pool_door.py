"""How the commands of `cloudmatrix pool` find the pool of a running service."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from memory_pool.admin import PoolAdmin
from memory_pool.directory import DirectoryError
from memory_pool.store import StoreError

Redis = Annotated[
    str | None,
    typer.Option(
        envvar="CLOUDMATRIX_REDIS", help="The pool's Redis; none: that of the service in --data-dir."
    ),
]
DataDir = Annotated[Path, typer.Option(envvar="CLOUDMATRIX_DATA_DIR", help="The service's data folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Namespace = Annotated[str, typer.Argument(help="The namespace, as `pool stats` lists it.")]

DATA_DIR = Path("~/.local/share/cloudmatrix")


@contextlib.contextmanager
def pool_admin(redis: str | None, data_dir: Path) -> Iterator[PoolAdmin]:
    """The pool, for one command. What goes wrong is one line; exit status 2 where the caller can mend it, else 1."""
    folder = data_dir.expanduser()
    try:
        with contextlib.closing(PoolAdmin(redis_url(redis, data_dir), disk_folder=folder / "kv")) as admin:
            yield admin
    except (ValueError, StoreError, DirectoryError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def redis_url(redis: str | None, data_dir: Path) -> str:
    """The Redis given, or that of the service in a folder. Raises ValueError when none runs there."""
    folder = data_dir.expanduser()
    noted = folder / "redis" / "url"
    if redis is None and not noted.exists():
        raise ValueError(f"no service runs in {folder}: start one, or give its Redis with --redis URL")
    return redis or noted.read_text()
