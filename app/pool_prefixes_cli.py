"""`cloudmatrix pool share … pins`: prefixes that all tenants share, and prefixes that are pinned."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from app.pool_door import DATA_DIR, AsJson, DataDir, Redis, pool_admin, redis_url
from engine.protocol import WorkerRecord
from memory_pool.directory import Directory
from memory_pool.keys import namespace_of
from memory_pool.pins import MAX_TTL_S
from memory_pool.shared_prefixes import SharedPrefix

prefixes_app = typer.Typer()

Name = Annotated[str, typer.Argument(help="A name of yours for the prefix: letters, digits, `_ . -`.")]
Text = Annotated[str | None, typer.Option(help="The prefix as text, for /v1/completions.")]
File = Annotated[Path | None, typer.Option(help="A file with the prefix as text.")]
Messages = Annotated[
    Path | None, typer.Option(help="A JSON file with the messages that conversations begin with.")
]
System = Annotated[str | None, typer.Option(help="The system prompt that conversations begin with.")]
Model = Annotated[str | None, typer.Option(help="The model; none: the one that is served.")]
Tenant = Annotated[str | None, typer.Option(help="Whose prompts; none: those of callers without a tenant.")]


@prefixes_app.command()
def share(
    name: Name,
    system: System = None,
    messages: Messages = None,
    text: Text = None,
    file: File = None,
    model: Model = None,
    redis: Redis = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Open a prefix to all tenants."""
    with pool_admin(redis, data_dir) as admin:
        _check_name(name)
        record = _record(redis_url(redis, data_dir), model)
        tokens = _tokens(record, system, messages, text, file)
        prefix = SharedPrefix.of(tokens, block_tokens=record.block_tokens, fingerprint=record.fingerprint)
        admin.share(name, prefix)
    _say(as_json, {"name": name, "num_tokens": prefix.num_tokens, "num_blocks": len(prefix.keys)})


@prefixes_app.command()
def unshare(name: Name, redis: Redis = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Close a shared prefix again."""
    with pool_admin(redis, data_dir) as admin:
        if not admin.unshare(name):
            raise ValueError(f"there is no shared prefix {name!r}; `cloudmatrix pool shared` lists them")
    _say(as_json, {"name": name, "shared": False})


@prefixes_app.command()
def shared(redis: Redis = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Prefixes that are open to all tenants."""
    with pool_admin(redis, data_dir) as admin:
        prefixes = admin.shared()
    rows = [
        {
            "name": name,
            "num_tokens": each.num_tokens,
            "num_blocks": len(each.keys),
            "fingerprint": each.fingerprint,
        }
        for name, each in sorted(prefixes.items())
    ]
    _list(as_json, "shared", rows)


@prefixes_app.command()
def pin(
    name: Name,
    ttl_s: Annotated[float, typer.Option("--ttl-s", min=1, max=MAX_TTL_S, help="For how long.")] = 3600.0,
    tenant: Tenant = None,
    cache_salt: Annotated[str, typer.Option(help="The salt that requests send, if they do.")] = "",
    system: System = None,
    messages: Messages = None,
    text: Text = None,
    file: File = None,
    model: Model = None,
    redis: Redis = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep a prefix in DRAM for a while, as long as anything else can go."""
    from app.requests.chain import chain_of

    with pool_admin(redis, data_dir) as admin:
        _check_name(name)
        record = _record(redis_url(redis, data_dir), model)
        tokens = _tokens(record, system, messages, text, file)
        namespace = namespace_of(tenant)
        chain = chain_of(tokens, record, admin.shared(), namespace=namespace, salt=cache_salt)
        if not chain.keys:
            raise ValueError(f"a prefix fills at least one block of {record.block_tokens} tokens")
        made = admin.pin(namespace, name, num_tokens=len(tokens), keys=chain.keys, ttl_s=ttl_s)
    _say(
        as_json,
        {
            "name": name,
            "namespace": namespace,
            "num_tokens": made.num_tokens,
            "num_blocks": len(made.keys),
            "ends_in_s": ttl_s,
        },
    )


@prefixes_app.command()
def unpin(
    name: Name,
    tenant: Tenant = None,
    redis: Redis = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """End a pin before its time."""
    namespace = namespace_of(tenant)
    with pool_admin(redis, data_dir) as admin:
        if not admin.unpin(namespace, name):
            raise ValueError(f"{namespace} has no pin {name!r}; `cloudmatrix pool pins` lists them")
    _say(as_json, {"name": name, "namespace": namespace, "pinned": False})


@prefixes_app.command()
def pins(redis: Redis = None, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Prefixes that are pinned."""
    with pool_admin(redis, data_dir) as admin:
        rows = [
            {
                "name": each.name,
                "namespace": each.namespace,
                "num_tokens": each.num_tokens,
                "num_blocks": len(each.keys),
                "ends_in_s": ends_in_s,
            }
            for each, ends_in_s in admin.pins()
        ]
    _list(as_json, "pins", rows)


def _check_name(name: str) -> None:
    from app.api.prefixes import PREFIX_NAME

    if not PREFIX_NAME.fullmatch(name):
        raise ValueError(f"NAME must be 1 to 64 letters, digits, `_`, `.` or `-`, not {name!r}")


def _record(url: str, model: str | None) -> WorkerRecord:
    """A worker of the model: its KV layout is what names are made from. Raises ValueError when none is ready."""
    directory = Directory(url)
    try:
        records = [msgspec.msgpack.decode(data, type=WorkerRecord) for data in directory.members().values()]
    finally:
        directory.close()
    for record in records:
        if record.state != "starting" and model in (None, record.model):
            return record
    raise ValueError(f"no worker of {model or 'any model'} is ready: names depend on its weights")


def _tokens(
    record: WorkerRecord, system: str | None, messages: Path | None, text: str | None, file: Path | None
) -> list[int]:
    # What tokenises is heavy, and no other command of `cloudmatrix pool` needs it.
    from app.api.prefixes import Prefix, prefix_tokens
    from app.api.schemas import Message
    from app.errors import GatewayError
    from app.models import catalogue
    from app.models.entry import ModelError
    from app.requests.served import ServedModel
    from app.text import load_text

    if sum(given is not None for given in (system, messages, text, file)) != 1:
        raise ValueError("give the prefix by one of --system, --messages, --text and --file")
    try:
        if system is not None:
            prefix = Prefix(messages=[Message(role="system", content=system)])
        elif messages is not None:
            prefix = Prefix(messages=msgspec.json.decode(messages.read_bytes(), type=list[Message]))
        else:
            prefix = Prefix(prompt=text if file is None else file.read_text())
        entry = catalogue.resolve(record.model)
        return asyncio.run(prefix_tokens(ServedModel(entry, load_text(entry), 0), prefix))
    except (OSError, ModelError, GatewayError, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None


def _say(as_json: bool, row: Mapping[str, Any]) -> None:
    typer.echo(
        json.dumps(row) if as_json else "  ".join(f"{name} {_cell(value)}" for name, value in row.items())
    )


def _list(as_json: bool, title: str, rows: list[dict[str, Any]]) -> None:
    if as_json:
        typer.echo(json.dumps({title: rows}))
    elif not rows:
        typer.echo("none")
    else:
        for row in rows:
            _say(False, row)


def _cell(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
