"""`cloudmatrix pool`: what the memory pool holds, quotas, shared and pinned prefixes, throwing a namespace out."""

import json
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from app.pool_door import DATA_DIR, AsJson, DataDir, Namespace, Redis, pool_admin
from app.pool_prefixes_cli import prefixes_app
from app.pool_replay_cli import replay
from app.pool_tables import block_table, pool_tables
from memory_pool.acl import ROLES, Role, rules

pool_app = typer.Typer(help="The memory pool of a running service.", no_args_is_help=True)

pool_app.add_typer(prefixes_app)
pool_app.command()(replay)


@pool_app.command()
def stats(redis: Redis = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Blocks, bytes, hits, misses and evictions, by tier and namespace, and what the keeper's last audit found."""
    with pool_admin(redis, data_dir) as admin:
        found = admin.stats()
    if as_json:
        typer.echo(json.dumps(found))
        return
    _print(pool_tables(found))


@pool_app.command()
def inspect(
    namespace: Namespace,
    most: Annotated[int, typer.Option(min=1, help="How many blocks to list.")] = 100,
    redis: Redis = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """The blocks of a namespace: names and sizes, never what they say."""
    with pool_admin(redis, data_dir) as admin:
        blocks = admin.inspect(namespace, most=most)
    if as_json:
        typer.echo(json.dumps({"namespace": namespace, "blocks": blocks}))
        return
    _print(block_table(namespace, blocks))


@pool_app.command()
def purge(
    namespace: Namespace, redis: Redis = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False
) -> None:
    """Remove a namespace's blocks from DRAM and disk."""
    with pool_admin(redis, data_dir) as admin:
        removed = admin.purge(namespace)
    typer.echo(
        json.dumps({"namespace": namespace, "removed": removed}) if as_json else f"{removed} blocks removed"
    )


@pool_app.command()
def quota(
    namespace: Namespace,
    num_bytes: Annotated[int | None, typer.Argument(help="The limit in bytes; none: lift it.")] = None,
    redis: Redis = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Limit the bytes of a namespace."""
    with pool_admin(redis, data_dir) as admin:
        admin.set_quota(namespace, num_bytes)
    limit = "no quota" if num_bytes is None else f"{num_bytes:,} B"
    typer.echo(
        json.dumps({"namespace": namespace, "quota_bytes": num_bytes}) if as_json else f"{namespace}: {limit}"
    )


@pool_app.command()
def acl(
    role: Annotated[Role | None, typer.Argument(help="gateway, worker or keeper; none: all of them.")] = None,
) -> None:
    """The rules that make a user of your Redis for each role, to be given to redis-cli line by line."""
    for one in ROLES if role is None else (role,):
        typer.echo(f"ACL SETUSER cloudmatrix-{one} on >PASSWORD {' '.join(rules(one))}")


def _print(what: RenderableType) -> None:
    # Whole names and numbers also where the output is a pipe or a narrow window: they are there to be copied.
    console = Console()
    Console(width=max(console.width, 160), soft_wrap=True).print(what)
