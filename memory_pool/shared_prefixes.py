"""Prefixes that an administrator opened to all tenants, e.g. a common system prompt.

A prefix is kept as the names of its full blocks in the shared region. A prompt that begins with it takes those blocks
under the shared names and branches off into its own tenant's names behind them, so that nothing a tenant wrote itself
is ever found by another.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memory_pool.connection import AsyncConnection, Connection
from memory_pool.keys import SHARED_NAMESPACE, block_keys

SHARED = "cm:shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """The full blocks of a prefix of `num_tokens` tokens under one model (`fingerprint`)."""

    fingerprint: str
    num_tokens: int
    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, tokens: Sequence[int], *, block_tokens: int, fingerprint: str) -> "SharedPrefix":
        """The prefix of `tokens`. Raises ValueError when they do not fill a block."""
        keys = block_keys(
            tokens, block_tokens=block_tokens, fingerprint=fingerprint, namespace=SHARED_NAMESPACE
        )
        if not keys:
            raise ValueError(
                f"a shared prefix fills at least one block of {block_tokens} tokens; this one has {len(tokens)}"
            )
        return cls(fingerprint=fingerprint, num_tokens=len(tokens), keys=tuple(keys))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fingerprint": self.fingerprint,
            "num_tokens": self.num_tokens,
            "keys": [key.hex() for key in self.keys],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "SharedPrefix":
        """Back from `as_dict`. Raises KeyError, TypeError or ValueError when it is not that."""
        return cls(
            fingerprint=str(value["fingerprint"]),
            num_tokens=int(value["num_tokens"]),
            keys=tuple(bytes.fromhex(key) for key in value["keys"]),
        )


def num_shared_blocks(
    tokens: Sequence[int], prefixes: Iterable[SharedPrefix], *, block_tokens: int, fingerprint: str
) -> int:
    """How many leading blocks of a prompt lie in one of the prefixes. Pure."""
    usable = [prefix.keys for prefix in prefixes if prefix.fingerprint == fingerprint]
    longest = max(map(len, usable), default=0)
    if not longest:
        return 0
    mine = block_keys(
        tokens[: longest * block_tokens],
        block_tokens=block_tokens,
        fingerprint=fingerprint,
        namespace=SHARED_NAMESPACE,
    )
    # A name stands for all tokens before it, so the last common one says that all are.
    return max((sum(a == b for a, b in zip(mine, keys, strict=False)) for keys in usable), default=0)


class SharedPrefixes:
    """The shared prefixes in Redis, by name; for threads. Verbs raise StoreError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def share(self, name: str, prefix: SharedPrefix, *, only_if_none: bool = False) -> None:
        """Open a prefix to all."""
        self._connection.call(
            "HSETNX" if only_if_none else "HSET", SHARED, name, json.dumps(prefix.as_dict())
        )

    def unshare(self, name: str) -> bool:
        """Close it again: later prompts take their tenants' own names. False when there is none of that name."""
        return bool(self._connection.call("HDEL", SHARED, name))

    def all(self) -> dict[str, SharedPrefix]:
        """Every prefix, by name."""
        flat = self._connection.call("HGETALL", SHARED)
        return _prefixes(flat)


class AsyncSharedPrefixes:
    """For an event loop; see SharedPrefixes."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def share(self, name: str, prefix: SharedPrefix) -> None:
        """See SharedPrefixes."""
        await self._connection.call("HSET", SHARED, name, json.dumps(prefix.as_dict()))

    async def unshare(self, name: str) -> bool:
        """See SharedPrefixes."""
        return bool(await self._connection.call("HDEL", SHARED, name))

    async def all(self) -> dict[str, SharedPrefix]:
        """See SharedPrefixes."""
        return _prefixes(await self._connection.call("HGETALL", SHARED))


def _prefixes(flat: Mapping[bytes, bytes] | Sequence[bytes]) -> dict[str, SharedPrefix]:
    pairs = flat.items() if isinstance(flat, Mapping) else zip(flat[::2], flat[1::2], strict=True)
    return {name.decode(): SharedPrefix.from_dict(json.loads(value)) for name, value in pairs}
