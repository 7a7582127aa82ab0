"""The `cloudmatrix` command: names the sub-commands and turns expected errors into one clear line."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from app.bench.cli import bench_app
from app.evaluate.cli import eval_app
from app.models.cli import models_app
from app.pool_cli import pool_app
from app.requests.cli import requests_app
from app.tenancy.cli import keys_app
from app.tenancy.prices_cli import prices_app
from app.tenancy.tenants_cli import tenants_app
from app.tenancy.usage_cli import usage
from app.tenancy.users_cli import users_app
from app.twin.cli import twin_app
from app.twin.fabric_cli import fabric_app
from engine.protocol import Role
from observe import logs, traces

app = typer.Typer(
    name="cloudmatrix",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for sub_app, name in (
    (models_app, "models"),
    (bench_app, "bench"),
    (eval_app, "eval"),
    (pool_app, "pool"),
    (requests_app, "requests"),
    (keys_app, "keys"),
    (tenants_app, "tenants"),
    (users_app, "users"),
    (prices_app, "prices"),
    (fabric_app, "fabric"),
    (twin_app, "twin"),
):
    app.add_typer(sub_app, name=name)

app.command()(usage)

MIB = 1 << 20


def _env(name: str) -> str:
    return f"CLOUDMATRIX_{name}"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("cloudmatrix"))
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Model-as-a-Service after CloudMatrix384: disaggregated prefill and decode over a pooled KV cache."""


@app.command()
def up(
    prefill: Annotated[int, typer.Option(min=0, envvar=_env("PREFILL"), help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=0, envvar=_env("DECODE"), help="Decode workers.")] = 1,
    both: Annotated[int, typer.Option(min=0, envvar=_env("BOTH"), help="Workers that do both.")] = 0,
    model: Annotated[
        str, typer.Option(envvar=_env("MODEL"), help="A model of `models list`.")
    ] = "smollm2-135m",
    redis: Annotated[
        str | None,
        typer.Option(envvar=_env("REDIS"), help="A Redis of yours; none: a private one is started."),
    ] = None,
    gateway_redis: Annotated[
        str | None,
        typer.Option(
            envvar=_env("GATEWAY_REDIS"), help="That Redis as the gateways' own user; see `pool acl`."
        ),
    ] = None,
    host: Annotated[str, typer.Option(envvar=_env("HOST"), help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar=_env("PORT"), help="Gateway; 0: any free port.")
    ] = 8000,
    console_port: Annotated[
        int, typer.Option(min=0, max=65535, envvar=_env("CONSOLE_PORT"), help="Console; 0: any free port.")
    ] = 8080,
    no_console: Annotated[bool, typer.Option("--no-console", help="Do not start the console.")] = False,
    data_dir: Annotated[
        Path, typer.Option(envvar=_env("DATA_DIR"), help="Everything the service writes goes here.")
    ] = Path("~/.local/share/cloudmatrix"),
    threads: Annotated[
        int | None,
        typer.Option(min=1, envvar=_env("THREADS"), help="Threads a worker; none: one a core, at most 8."),
    ] = None,
    kv_memory_mib: Annotated[
        int, typer.Option(min=32, envvar=_env("KV_MEMORY_MIB"), help="KV cache of each worker.")
    ] = 1024,
    pool_memory_mib: Annotated[
        int, typer.Option(min=64, envvar=_env("POOL_MEMORY_MIB"), help="Memory of the private Redis.")
    ] = 2048,
    pool_disk_mib: Annotated[
        int | None,
        typer.Option(
            min=0,
            envvar=_env("POOL_DISK_MIB"),
            help="Disk below the pool's memory; 0: none; unset: half of what is free, at most 8 GiB.",
        ),
    ] = None,
    autoscale: Annotated[
        bool,
        typer.Option("--autoscale", envvar=_env("AUTOSCALE"), help="Turn workers' roles as the load asks."),
    ] = False,
    gateways: Annotated[
        int, typer.Option(min=1, envvar=_env("GATEWAYS"), help="Gateway processes behind the one port.")
    ] = 1,
    drain_s: Annotated[
        float,
        typer.Option(min=0, envvar=_env("DRAIN_S"), help="How long answers may go on once told to stop."),
    ] = 30.0,
    otel: Annotated[
        str,
        typer.Option(
            envvar=_env("OTEL"), help="Traces: off, console, or otlp (to OTEL_EXPORTER_OTLP_ENDPOINT)."
        ),
    ] = "off",
    log_format: Annotated[
        str, typer.Option(envvar=_env("LOG_FORMAT"), help="Log lines of all processes: text or json.")
    ] = "text",
    request_log: Annotated[
        Path | None,
        typer.Option(envvar=_env("REQUEST_LOG"), help="One line for each request in this file, no prompts."),
    ] = None,
    exit_with_parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    """Start the whole service on this machine and keep it running until Ctrl-C."""
    from app.matrix.cores import default_threads
    from app.up import UpOptions, run
    from engine.lifeline import exit_with_parent as watch_parent

    if exit_with_parent:
        watch_parent()
    run(
        UpOptions(
            prefill=prefill,
            decode=decode,
            both=both,
            model=model,
            redis_url=redis,
            gateway_redis_url=gateway_redis,
            host=host,
            port=port,
            console_port=None if no_console else console_port,
            data_dir=data_dir.expanduser().resolve(),
            threads=threads or default_threads(),
            kv_memory_bytes=kv_memory_mib * MIB,
            pool_memory_bytes=pool_memory_mib * MIB,
            pool_disk_bytes=None if pool_disk_mib is None else pool_disk_mib * MIB,
            autoscale=autoscale,
            gateways=gateways,
            drain_s=drain_s,
            observe=observed(otel, log_format),
            request_log=None if request_log is None else request_log.expanduser().resolve(),
        )
    )


def observed(otel: str, log_format: str) -> dict[str, str]:
    """The variables that tell every process what to trace and how to log; typer's error for unknown values."""
    if log_format not in logs.FORMATS:
        raise typer.BadParameter(f"{log_format!r}: choose text or json", param_hint="--log-format")
    try:
        return {traces.VARIABLE: traces.mode_of(otel), logs.VARIABLE: log_format}
    except ValueError:
        raise typer.BadParameter(f"{otel!r}: choose off, console or otlp", param_hint="--otel") from None


@app.command()
def worker(
    role: Annotated[Role, typer.Option(help="What it does.")],
    redis: Annotated[
        str, typer.Option(envvar=_env("REDIS_URL"), help="Where the workers meet and share KV.")
    ],
    model: Annotated[
        str, typer.Option(envvar=_env("MODEL"), help="A model of `models list`.")
    ] = "smollm2-135m",
    index: Annotated[int, typer.Option(min=0, help="Which one of its role: its name and place.")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; `auto`: what this host's name means.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, envvar=_env("THREADS"))] = None,
    kv_memory_mib: Annotated[int, typer.Option(min=32, envvar=_env("KV_MEMORY_MIB"))] = 1024,
    model_cache_mib: Annotated[
        int,
        typer.Option(
            min=0, envvar=_env("MODEL_CACHE_MIB"), help="Room for models in the pool; 0: none is kept there."
        ),
    ] = 0,
) -> None:
    """Run one worker by itself, to grow a service over several machines or containers.

    Workers trust whoever reaches them: keep them on a private network.
    """
    from app.matrix.cores import default_threads
    from app.matrix.solo import run_worker

    run_worker(
        role,
        index,
        model,
        redis,
        host,
        threads or default_threads(),
        kv_memory_mib * MIB,
        port,
        model_cache_mib * MIB,
    )


@app.command()
def gateway() -> None:
    """Run the gateway by itself; its settings come from `CLOUDMATRIX_…` variables (docs/operations.md)."""
    from app.models import catalogue
    from app.serve import main as serve
    from app.settings import Settings

    catalogue.pull(Settings().model)
    serve()


@app.command()
def console() -> None:
    """Run the console by itself; `CLOUDMATRIX_GATEWAY_URL` names the gateway."""
    from app.console.serve import main as serve

    serve()


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all a user needs; imported when there is one, to keep the command quick."""
    from app.matrix.data_folder import DataFolderError
    from app.matrix.local import ProcessFailedError
    from app.matrix.solo import KernelsError
    from app.models.entry import ModelError
    from app.up import UpError
    from engine.weights.errors import ModelFileError
    from memory_pool.redis_server import RedisServerError

    return (
        UpError,
        DataFolderError,
        ProcessFailedError,
        KernelsError,
        ModelError,
        ModelFileError,
        RedisServerError,
    )


def main() -> None:
    """Entry point of the `cloudmatrix` command: exit status 1 and one clear message for an expected error."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
