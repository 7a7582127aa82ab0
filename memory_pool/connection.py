"""Connections to Redis, single server or cluster, for small commands. The one file that knows redis-py.

A URL is `redis://`, `rediss://` (TLS) or `unix://`; whether a cluster answers is found out by asking. Every failure is
a `StoreError`, whose text never holds a password.
"""

import asyncio
import dataclasses
import ssl
import threading
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.crc import key_slot
from redis.retry import Retry

from memory_pool.resp import ChannelError, Endpoint, RefusedError
from memory_pool.shared_channel import SharedChannel
from memory_pool.store import StoreError, StoreFullError

DEFAULT_TIMEOUT_S = 2.0

Words = str | bytes | int | float

_FAILURES = (redis.RedisError, redis.RedisClusterException, OSError)
_ASYNC_FAILURES = (*_FAILURES, AttributeError, RuntimeError)
"""redis-py's asyncio cluster client, when it closes a node's connections after a failure, pulls them from under the
other tasks that are using them: what these see is a writer that is None, or a reader with two readers."""


def endpoint_of(url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Endpoint:
    """Where a Redis URL points. Raises ValueError, which never shows the password, when it is not one."""
    try:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]  # untyped in redis-py
    except ValueError as error:
        raise ValueError("a Redis URL starts with redis://, rediss:// or unix://") from error
    return Endpoint(
        host=options.get("host", "127.0.0.1"),
        port=options.get("port", 6379),
        path=options.get("path"),
        username=options.get("username"),
        password=options.get("password"),
        database=options.get("db", 0),
        tls=_tls(options) if url.startswith("rediss://") else None,
        timeout_s=timeout_s,
    )


class Connection:
    """For threads."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._endpoint = endpoint_of(url, timeout_s=timeout_s)
        self._url = url
        self._options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            # One more try at once, for a connection that died while idle; waiting is the pool client's business.
            "retry": Retry(NoBackoff(), 1),
        }
        self._lock = threading.Lock()
        self._client: redis.Redis | redis.RedisCluster | None = None

    @property
    def is_cluster(self) -> bool:
        """Raises StoreError while the server has not been reached."""
        return isinstance(self._connected(), redis.RedisCluster)

    def run(self, script: str, keys: Sequence[Words], args: Sequence[Words] = ()) -> Any:
        """Run a Lua script on the server that holds its keys."""
        return self.call("EVAL", script, len(keys), *keys, *args)

    def call(self, *words: Words) -> Any:
        """One command."""
        client = self._connected()
        try:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]  # untyped in redis-py
        except _FAILURES as error:
            raise _store_error(error) from error

    def call_many(self, commands: Sequence[Sequence[Words]]) -> list[Any]:
        """Commands on one key each, pipelined; the answers in order."""
        client = self._connected()
        try:
            with client.pipeline(transaction=False) as pipeline:
                for words in commands:
                    pipeline.execute_command(*words)
                return pipeline.execute() if commands else []
        except _FAILURES as error:
            raise _store_error(error) from error

    def scan(self, pattern: str) -> list[bytes]:
        """All keys that match, on every server."""
        client = self._connected()
        try:
            return list(client.scan_iter(match=pattern, count=1000))
        except _FAILURES as error:
            raise _store_error(error) from error

    def memory(self) -> tuple[int, int]:
        """Bytes used and bytes allowed (0: no limit), over all master servers."""
        client = self._connected()
        try:
            if isinstance(client, redis.RedisCluster):
                infos = client.info("memory", target_nodes=redis.RedisCluster.PRIMARIES)
                each = list(infos.values()) if "used_memory" not in infos else [infos]
            else:
                each = [client.info("memory")]
        except _FAILURES as error:
            raise _store_error(error) from error
        return sum(info["used_memory"] for info in each), sum(info["maxmemory"] for info in each)

    def endpoint(self, key: bytes) -> Endpoint:
        """The server that holds a Redis key."""
        client = self._connected()
        if not isinstance(client, redis.RedisCluster):
            return self._endpoint
        try:
            node = client.nodes_manager.get_node_from_slot(key_slot(key))
        except _FAILURES as error:
            raise _store_error(error) from error
        return dataclasses.replace(self._endpoint, host=node.host, port=node.port)

    def refresh(self) -> None:
        """Learn anew which server holds what; for a single server nothing."""
        client = self._connected()
        if isinstance(client, redis.RedisCluster):
            try:
                client.nodes_manager.initialize()
            except _FAILURES as error:
                raise _store_error(error) from error

    def close(self) -> None:
        """Idempotent."""
        if self._client is not None:
            self._client.close()

    def _connected(self) -> redis.Redis | redis.RedisCluster:
        with self._lock:
            if self._client is None:
                single = redis.Redis.from_url(self._url, **self._options)
                try:
                    if single.info("cluster").get("cluster_enabled"):
                        single.close()
                        self._client = redis.RedisCluster.from_url(self._url, **self._options)
                    else:
                        self._client = single
                except _FAILURES as error:
                    single.close()
                    raise _store_error(error) from error
            return self._client


class AsyncConnection:
    """For one event loop; see Connection. Scripts go to a single server over one channel that all tasks share."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._scripts = SharedChannel(endpoint_of(url, timeout_s=timeout_s))
        self._url = url
        self._options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": AsyncRetry(NoBackoff(), 1),
        }
        self._lock = asyncio.Lock()
        self._client: redis.asyncio.Redis | redis.asyncio.RedisCluster | None = None

    async def is_cluster(self) -> bool:
        """Raises StoreError while the server has not been reached."""
        return isinstance(await self._connected(), redis.asyncio.RedisCluster)

    async def run(self, script: str, keys: Sequence[Words], args: Sequence[Words] = ()) -> Any:
        """Run a Lua script on the server that holds its keys."""
        words = ("EVAL", script, len(keys), *keys, *args)
        if await self.is_cluster():
            return await self.call(*words)
        try:
            return await self._scripts.call(*words)
        except (ChannelError, RefusedError) as error:
            raise _store_error(error) from error

    async def call(self, *words: Words) -> Any:
        """One command."""
        client = await self._connected()
        try:
            return await client.execute_command(*words)
        except _ASYNC_FAILURES as error:
            raise _store_error(error) from error

    async def call_many(self, commands: Sequence[Sequence[Words]]) -> list[Any]:
        """Commands on one key each, pipelined; the answers in order."""
        client = await self._connected()
        try:
            async with client.pipeline(transaction=False) as pipeline:
                for words in commands:
                    pipeline.execute_command(*words)
                return await pipeline.execute() if commands else []
        except _ASYNC_FAILURES as error:
            raise _store_error(error) from error

    async def memory(self) -> tuple[int, int]:
        """Bytes used and bytes allowed (0: no limit), over all master servers."""
        client = await self._connected()
        try:
            if isinstance(client, redis.asyncio.RedisCluster):
                each = [await client.info("memory", target_nodes=node) for node in client.get_primaries()]
            else:
                each = [await client.info("memory")]
        except _ASYNC_FAILURES as error:
            raise _store_error(error) from error
        return sum(info["used_memory"] for info in each), sum(info["maxmemory"] for info in each)

    async def close(self) -> None:
        """Idempotent."""
        self._scripts.close()
        if self._client is not None:
            await self._client.aclose()

    async def _connected(self) -> redis.asyncio.Redis | redis.asyncio.RedisCluster:
        if self._client is not None:
            return self._client
        async with self._lock:
            if self._client is None:
                self._client = await self._connect()
            return self._client

    async def _connect(self) -> redis.asyncio.Redis | redis.asyncio.RedisCluster:
        single = redis.asyncio.Redis.from_url(self._url, **self._options)
        try:
            cluster = (await single.info("cluster")).get("cluster_enabled")
        except _ASYNC_FAILURES as error:
            await single.aclose()
            raise _store_error(error) from error
        if not cluster:
            return single
        await single.aclose()
        client = redis.asyncio.RedisCluster.from_url(self._url, **self._options)
        try:
            await client.initialize()
        except _ASYNC_FAILURES as error:
            await client.aclose()
            raise _store_error(error) from error
        return client


def _tls(options: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    if options.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _store_error(error: Exception) -> StoreError:
    kind = (
        StoreFullError
        if isinstance(error, redis.OutOfMemoryError) or "OOM command" in str(error)
        else StoreError
    )
    return kind(f"{type(error).__name__}: {error}")
