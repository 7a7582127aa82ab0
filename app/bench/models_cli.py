"""`cloudmatrix bench models`: how long a worker waits for its model, from its origin and from the pool."""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from memory_pool.model_cache import ModelCache

PAPER_S = {"cold": ("~2,560 s", "~320 s"), "warm": ("–", "~5 s"), "switch": ("~320 s", "~5 s")}
"""Without a cache and with EMS: the CloudMatrix384 paper, Table 1; DeepSeek-R1 671B INT8, 8 instances, 2.5 GB/s."""


def models(
    model: Annotated[str, typer.Option(help="A model of the catalogue.")] = "smollm2-135m",
    repeat: Annotated[int, typer.Option(min=1, help="Starts from the pool, of which the median counts.")] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Measure a start with the model from its origin, from the pool, and a switch to another model in the pool."""
    from app.models import catalogue
    from engine.model import Model
    from memory_pool.model_cache import ModelCache
    from memory_pool.redis_server import start_redis

    def load() -> float:
        started_at = time.perf_counter()
        Model.load(entry.path, num_threads=1).close()
        return time.perf_counter() - started_at

    entry = catalogue.pull(model)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = start_redis(folder)
        stack.callback(server.stop)
        pool = stack.enter_context(
            contextlib.closing(ModelCache(server.url, capacity_bytes=2 * entry.path.stat().st_size))
        )
        cold_s = _pull_s(model, folder / "origin", pool)
        warm = [_pull_s(model, folder / f"pool-{turn}", pool) for turn in range(repeat)]
        load()
        loads = [load() for _ in range(repeat)]
    warm_s, load_s = statistics.median(warm), statistics.median(loads)
    result = {
        "model": entry.id,
        "weights_bytes": entry.path.stat().st_size,
        "cold_fetch_s": cold_s,
        "warm_fetch_s": warm_s,
        "load_s": load_s,
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table("start", "fetch, s", "load, s", "together, s", "paper, no cache", "paper, EMS")
    for row, name, fetch_s in (
        ("cold", "cold: from the registry, then put into the pool", cold_s),
        ("warm", "warm: from the pool", warm_s),
        ("switch", "switch: another model that lies in the pool", warm_s),
    ):
        seconds = (fetch_s, load_s, fetch_s + load_s)
        table.add_row(name, *(f"{value:.2f}" for value in seconds), *PAPER_S[row])
    console = Console()
    console.print(table)
    console.print(
        f"Measured with {entry.id}, {entry.path.stat().st_size / 1e6:.0f} MB; medians of {repeat}. A switch is a start "
        "of a worker with the other model. Paper: DeepSeek-R1 671B INT8, 8 instances, Table 1, not measured here."
    )


def _pull_s(model: str, folder: Path, pool: "ModelCache") -> float:
    from app.models import catalogue

    with _cache_dir(folder):
        started_at = time.perf_counter()
        catalogue.pull(model, pool=pool)
        return time.perf_counter() - started_at


@contextlib.contextmanager
def _cache_dir(folder: Path) -> Iterator[None]:
    """Another cache folder, where no model is yet."""
    before = os.environ.get("CLOUDMATRIX_CACHE_DIR")
    os.environ["CLOUDMATRIX_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CLOUDMATRIX_CACHE_DIR"]
        else:
            os.environ["CLOUDMATRIX_CACHE_DIR"] = before
