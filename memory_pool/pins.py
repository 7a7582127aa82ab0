"""Soft pins: prefixes that stay in DRAM for a while although nobody asks for them, as long as anything else can go.

A pin is a decision, kept in Redis by namespace and name. The keeper acts on it: it leases the blocks that are there,
and those that come later, in the pin's name, and lets go when the pin is gone or its time is over. Instants are
milliseconds on Redis's clock.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_pool import scripts
from memory_pool.connection import AsyncConnection, Connection

PINS = "cm:pins"
MAX_TTL_S = 30 * 24 * 3600.0
MAX_PINS = 100
"""Pins of one namespace."""


class TooManyPinsError(ValueError):
    """The namespace has `MAX_PINS` already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """The full blocks of a prefix of `num_tokens` tokens, pinned until an instant."""

    namespace: str
    name: str
    num_tokens: int
    keys: tuple[bytes, ...]
    until_ms: int

    @property
    def holder(self) -> str:
        """In whose name the blocks are leased."""
        return f"{scripts.PIN_PREFIX}{self.namespace} {self.name}"

    @property
    def field(self) -> str:
        """Where it is kept. Neither namespaces nor names hold a blank."""
        return f"{self.namespace} {self.name}"

    def encode(self) -> str:
        """For Redis."""
        return json.dumps(
            {
                "num_tokens": self.num_tokens,
                "keys": [key.hex() for key in self.keys],
                "until_ms": self.until_ms,
            }
        )

    @classmethod
    def decode(cls, field: str, value: str | bytes) -> "Pin":
        """Back from `field` and `encode`. Raises KeyError, TypeError or ValueError when it is not that."""
        namespace, name = field.split(" ")
        kept = json.loads(value)
        return cls(
            namespace=namespace,
            name=name,
            num_tokens=int(kept["num_tokens"]),
            keys=tuple(bytes.fromhex(key) for key in kept["keys"]),
            until_ms=int(kept["until_ms"]),
        )


class Pins:
    """For threads. Verbs raise StoreError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def pin(self, namespace: str, name: str, *, num_tokens: int, keys: Sequence[bytes], ttl_s: float) -> Pin:
        """Pin blocks; a pin of the same name is replaced. Raises TooManyPinsError."""
        _check(self.all(), namespace, name)
        until_ms = self.now_ms() + round(ttl_s * 1000)
        made = Pin(namespace=namespace, name=name, num_tokens=num_tokens, keys=tuple(keys), until_ms=until_ms)
        self._connection.call("HSET", PINS, made.field, made.encode())
        return made

    def restore(self, pin: Pin) -> None:
        """Bring back a pin that a Redis before this one had, unless it was made anew."""
        self._connection.call("HSETNX", PINS, pin.field, pin.encode())

    def unpin(self, namespace: str, name: str) -> bool:
        """End a pin before its time; False when there is none of that name."""
        return bool(self._connection.call("HDEL", PINS, f"{namespace} {name}"))

    def all(self) -> list[Pin]:
        """Every pin, also those whose time is over."""
        return _pins(self._connection.call("HGETALL", PINS))

    def now_ms(self) -> int:
        """Redis's clock."""
        return int(self._connection.run(scripts.NOW_MS, [PINS]))


class AsyncPins:
    """For an event loop; see Pins."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def pin(
        self, namespace: str, name: str, *, num_tokens: int, keys: Sequence[bytes], ttl_s: float
    ) -> Pin:
        """See Pins."""
        _check(await self.all(), namespace, name)
        until_ms = await self.now_ms() + round(ttl_s * 1000)
        made = Pin(namespace=namespace, name=name, num_tokens=num_tokens, keys=tuple(keys), until_ms=until_ms)
        await self._connection.call("HSET", PINS, made.field, made.encode())
        return made

    async def unpin(self, namespace: str, name: str) -> bool:
        """See Pins."""
        return bool(await self._connection.call("HDEL", PINS, f"{namespace} {name}"))

    async def all(self) -> list[Pin]:
        """See Pins."""
        return _pins(await self._connection.call("HGETALL", PINS))

    async def now_ms(self) -> int:
        """Redis's clock."""
        return int(await self._connection.run(scripts.NOW_MS, [PINS]))


def _check(pins: Sequence[Pin], namespace: str, name: str) -> None:
    mine = [pin for pin in pins if pin.namespace == namespace and pin.name != name]
    if len(mine) >= MAX_PINS:
        raise TooManyPinsError(f"{namespace} has {MAX_PINS} pins, which is the most: end one before the next")


def _pins(flat: Mapping[bytes, bytes] | Sequence[bytes]) -> list[Pin]:
    pairs = flat.items() if isinstance(flat, Mapping) else zip(flat[::2], flat[1::2], strict=True)
    return sorted((Pin.decode(field.decode(), value) for field, value in pairs), key=lambda pin: pin.field)
