"""`cloudmatrix bench pool`: how fast blocks go into the pool and come back, beside raw SET and GET."""

import contextlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

BLOCK_BYTES = (391_680, 2 << 20)
"""32 tokens of SmolLM2-135M, and the size that EMS is measured with."""


def pool(
    redis: Annotated[
        str | None, typer.Option(help="A Redis of yours; none: a private one is started.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions, of which the medians count.")] = 15,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Measure publish and fetch, checksums and books included, against raw pipelined SET and GET of the same bytes."""
    from memory_pool.bench import measure
    from memory_pool.redis_server import start_redis
    from memory_pool.resp import ChannelError

    with contextlib.ExitStack() as stack:
        if redis is None:
            server = start_redis(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(server.stop)
        try:
            speeds = [measure(redis or server.url, block_bytes=size, repeat=repeat) for size in BLOCK_BYTES]
        except ChannelError as error:
            raise typer.BadParameter(f"cannot reach Redis: {error}", param_hint="--redis") from None
    if as_json:
        typer.echo(json.dumps({"speeds": [asdict(speed) for speed in speeds]}))
        return
    table = Table(
        "block, MB", "raw SET, GB/s", "publish, GB/s", "of raw", "raw GET, GB/s", "fetch, GB/s", "of raw"
    )
    for speed in speeds:
        table.add_row(
            f"{speed.block_bytes / 1e6:.2f}",
            f"{speed.raw_set_bytes_per_s / 1e9:.2f}",
            f"{speed.publish_bytes_per_s / 1e9:.2f}",
            f"{speed.publish_ratio:.1%}",
            f"{speed.raw_get_bytes_per_s / 1e9:.2f}",
            f"{speed.fetch_bytes_per_s / 1e9:.2f}",
            f"{speed.fetch_ratio:.1%}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{speeds[0].num_blocks} blocks at a time, medians of {repeat}; shares are medians of each repetition's own."
    )
