"""The store in Redis, single server or cluster: one value per block.

Values move over own channels (`resp.py`) straight from and to the caller's memory; everything small goes through
redis-py (`connection.py`). On a cluster, the blocks of a segment (`keys.py`) share a slot, so a prefix is read in one
pipeline per server; a server that cannot be reached costs its blocks only.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from memory_pool import scripts
from memory_pool.channels import Channels
from memory_pool.connection import DEFAULT_TIMEOUT_S, AsyncConnection, Connection
from memory_pool.keys import TAG_BYTES, tag_of
from memory_pool.resp import Channel, ChannelError, Endpoint, RefusedError
from memory_pool.store import Get, Put, StoreError

BLOCK_PREFIX = "cm:b:"
LEASE_PREFIX = "cm:l:"

_TRIES = 2
"""A second try goes over a new connection and, on a cluster, to where the block is now."""
_ELSEWHERE = ("MOVED", "ASK", "CLUSTERDOWN", "LOADING", "READONLY", "TRYAGAIN", "MASTERDOWN")

Answer = TypeVar("Answer")


def redis_key(key: bytes) -> bytes:
    """The Redis key of a block's name: readable, its placement tag as the hash tag of Redis Cluster."""
    return f"{BLOCK_PREFIX}{{{tag_of(key).hex()}}}{key[TAG_BYTES:].hex()}".encode()


def lease_key(tag: bytes) -> bytes:
    """The Redis key of the leases on the blocks of one placement tag."""
    return f"{LEASE_PREFIX}{{{tag.hex()}}}".encode()


def by_tag(keys: Sequence[bytes]) -> list[list[bytes]]:
    """Runs of neighbouring keys with the same placement tag."""
    return [list(run) for _, run in itertools.groupby(keys, key=tag_of)]


class RedisStore:
    """Blocks in Redis. Thread-safe: each thread at work has a channel of its own."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.connection = Connection(url, timeout_s=timeout_s)
        self._channels = Channels()

    def get_many(self, gets: Sequence[Get]) -> list[int | None]:
        """See Store."""

        def read(channel: Channel, names: list[bytes], indices: list[int]) -> list[int | RefusedError | None]:
            return channel.get_into(names, [gets[index].into for index in indices])

        answers = self._on_servers([redis_key(get.key) for get in gets], read)
        return [None if isinstance(answer, RefusedError) else answer for answer in answers]

    def put_many(self, puts: Sequence[Put]) -> list[bool]:
        """See Store."""

        def write(channel: Channel, names: list[bytes], indices: list[int]) -> list[bool | RefusedError]:
            chosen = [puts[index] for index in indices]
            return channel.set_from(
                (name, put.num_bytes, put.parts(), _set_options(put))
                for name, put in zip(names, chosen, strict=True)
            )

        answers = self._on_servers([redis_key(put.key) for put in puts], write)
        return [not isinstance(answer, RefusedError) for answer in answers]

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        return self._count(keys, lambda run: self.connection.run(scripts.COUNT_PREFIX, _names(run)))

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See Store."""

        def ask(channel: Channel, names: list[bytes], _: list[int]) -> list[bytes | RefusedError]:
            return channel.ask([(b"EXISTS", name) for name in names])

        return [answer == b":1" for answer in self._on_servers(_names(keys), ask)]

    def delete(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        return sum(self.connection.call_many([("UNLINK", name) for name in _names(keys)]))

    def lease(self, keys: Sequence[bytes], holder: str, ttl_s: float) -> int:
        """See Store."""

        def act(run: list[bytes]) -> int:
            names = [name for key in run for name in (lease_key(tag_of(key)), redis_key(key))]
            return int(self.connection.run(scripts.LEASE, names, [holder, _ms(ttl_s)]))

        return self._count(keys, act)

    def release(self, keys: Sequence[bytes], holder: str, ttl_s: float) -> None:
        """See Store."""
        for run in by_tag(keys):
            names = [lease_key(tag_of(run[0])), *_names(run)]
            self.connection.run(scripts.RELEASE, names, [holder, _ms(ttl_s)])

    def holders(self, keys: Sequence[bytes]) -> list[list[str]]:
        """In whose names each block is leased now. Raises StoreError."""
        leases: dict[bytes, list[str]] = {name: [] for name in _names(keys)}
        for tag in {tag_of(key) for key in keys}:
            for held in self.connection.run(scripts.HELD, [lease_key(tag)]):
                name, _, holder = held.partition(b" ")
                if name in leases:
                    leases[name].append(holder.decode())
        return list(leases.values())

    def evict(self, keys: Sequence[bytes], *, even_pinned: bool = False) -> list[bool]:
        """See Store."""
        removed: list[bool] = []
        for run in by_tag(keys):
            answers = self.connection.run(
                scripts.EVICT, [lease_key(tag_of(run[0])), *_names(run)], [int(even_pinned)]
            )
            removed += [bool(answer) for answer in answers]
        return removed

    def close(self) -> None:
        """See Store."""
        self._channels.close()
        self.connection.close()

    def _count(self, keys: Sequence[bytes], count: Callable[[list[bytes]], int]) -> int:
        total = 0
        runs = by_tag(keys) if keys and self.connection.is_cluster else [list(keys)]
        for run in runs:
            found = int(count(run)) if run else 0
            total += found
            if found < len(run):
                break
        return total

    def _on_servers(
        self,
        names: Sequence[bytes],
        act: Callable[[Channel, list[bytes], list[int]], list[Answer | RefusedError]],
    ) -> list[Answer | RefusedError]:
        """Do something with keys on whichever servers hold them.

        What no try reached is a RefusedError; StoreError when nothing was reached at all.
        """
        answers: dict[int, Answer | RefusedError] = {}
        failure = RefusedError("not tried")
        for attempt in range(_TRIES):
            pending: dict[Endpoint, list[int]] = {}
            for index, name in enumerate(names):
                if index not in answers:
                    pending.setdefault(self.connection.endpoint(name), []).append(index)
            if not pending:
                break
            for endpoint, indices in pending.items():
                try:
                    with self._channels.to(endpoint) as channel:
                        got = act(channel, [names[index] for index in indices], indices)
                except ChannelError as error:
                    failure = RefusedError(str(error))
                    continue
                for index, answer in zip(indices, got, strict=True):
                    if isinstance(answer, RefusedError) and str(answer).startswith(_ELSEWHERE):
                        failure = answer
                    else:
                        answers[index] = answer
            if len(answers) < len(names) and attempt + 1 < _TRIES:
                self.connection.refresh()
        if names and not answers:
            raise StoreError(str(failure))
        return [answers.get(index, failure) for index in range(len(names))]


class AsyncRedisStore:
    """What an event loop asks of the store: whether blocks are there. Used from one loop."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.connection = AsyncConnection(url, timeout_s=timeout_s)

    async def count_prefix(self, keys: Sequence[bytes]) -> int:
        """See Store."""
        total = 0
        runs = by_tag(keys) if keys and await self.connection.is_cluster() else [list(keys)]
        for run in runs:
            found = int(await self.connection.run(scripts.COUNT_PREFIX, _names(run))) if run else 0
            total += found
            if found < len(run):
                break
        return total

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See Store."""
        return [
            bool(there) for there in await self.connection.call_many([("EXISTS", n) for n in _names(keys)])
        ]

    async def close(self) -> None:
        """Release connections."""
        await self.connection.close()


def _names(keys: Sequence[bytes]) -> list[bytes]:
    return [redis_key(key) for key in keys]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _set_options(put: Put) -> list[bytes]:
    options = [b"PX", b"%d" % _ms(put.ttl_s)]
    return options if put.replace else [*options, b"NX"]
