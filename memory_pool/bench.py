"""How fast the pool moves blocks, beside raw pipelined SET and GET on the same kind of socket in the same run."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memory_pool.block import BlockFormat
from memory_pool.client import FetchItem, PoolClient, PutItem
from memory_pool.connection import endpoint_of
from memory_pool.keys import block_keys
from memory_pool.redis_store import redis_key
from memory_pool.resp import Channel

_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpeed:
    """Medians over the repetitions; the ratios are medians of each repetition's own ratio."""

    block_bytes: int
    num_blocks: int
    raw_set_bytes_per_s: float
    raw_get_bytes_per_s: float
    publish_bytes_per_s: float
    fetch_bytes_per_s: float
    publish_ratio: float
    fetch_ratio: float


def measure(url: str, *, block_bytes: int, num_blocks: int = 32, repeat: int = 15) -> PoolSpeed:
    """Publish and fetch a batch of blocks, checksums and books included, against raw SET and GET of the same bytes.

    Raises ChannelError when the server cannot be reached.
    """
    block_format = BlockFormat(
        fingerprint="bench",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_tokens=_TOKENS,
        payload_bytes=block_bytes,
    )
    tokens = list(range(num_blocks * _TOKENS))
    keys = block_keys(tokens, block_tokens=_TOKENS, fingerprint="bench", namespace="bench")
    names = [redis_key(key) for key in keys]
    source = np.random.default_rng(0).integers(0, 256, (num_blocks, block_bytes), np.uint8)
    target = np.ones_like(source)
    spans = [tokens[i * _TOKENS : (i + 1) * _TOKENS] for i in range(num_blocks)]
    puts = [
        PutItem(k, t, memoryview(row), None, "bench") for k, t, row in zip(keys, spans, source, strict=True)
    ]
    gets = [FetchItem(k, t, memoryview(row), "bench") for k, t, row in zip(keys, spans, target, strict=True)]
    rates: dict[str, list[float]] = {name: [] for name in ("raw_set", "publish", "raw_get", "fetch")}
    with (
        contextlib.closing(PoolClient(url, block_format)) as client,
        contextlib.closing(Channel(endpoint_of(url))) as channel,
    ):

        def timed(name: str, work: Callable[[], object]) -> None:
            started_at = time.perf_counter()
            work()
            rates[name].append(source.nbytes / (time.perf_counter() - started_at))

        for _ in range(repeat):
            client.delete(keys)
            timed(
                "raw_set",
                lambda: channel.set_from(
                    [(n, block_bytes, [p.payload], []) for n, p in zip(names, puts, strict=True)]
                ),
            )
            timed("raw_get", lambda: channel.get_into(names, [[get.into] for get in gets]))
            client.delete(keys)
            timed("publish", lambda: client.publish(puts))
            timed("fetch", lambda: client.fetch(gets))
        if not np.array_equal(source, target):
            raise AssertionError("what was fetched is not what was published")
        client.delete(keys)
    median = {name: statistics.median(values) for name, values in rates.items()}
    return PoolSpeed(
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        raw_set_bytes_per_s=median["raw_set"],
        raw_get_bytes_per_s=median["raw_get"],
        publish_bytes_per_s=median["publish"],
        fetch_bytes_per_s=median["fetch"],
        publish_ratio=_ratio(rates["publish"], rates["raw_set"]),
        fetch_ratio=_ratio(rates["fetch"], rates["raw_get"]),
    )


def _ratio(ours: list[float], raw: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, raw, strict=True))
