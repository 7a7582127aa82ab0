"""Which texts anybody has in the pool, whatever the namespace: to tell a prompt that is new from one that others wrote.

Only short keyed hashes are kept, under a secret that never leaves Redis and its clients, and only an answer of yes or
no comes out, which is shown to administrators alone: a tenant must not learn what others ask.
"""

import hashlib
import secrets
import time
from collections.abc import Iterable

from memory_pool.connection import Connection

CONTENTS = "cm:contents"
SECRET = "cm:contents:secret"  # noqa: S105 - the name of a Redis key, not a secret
MAX_REMEMBERED = 100_000
"""Hashes kept; the oldest go first."""

_HASH_BYTES = 8


class Contents:
    """The hashes of contents (`keys.content_keys`). For threads. Verbs raise StoreError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._secret: bytes | None = None

    def note(self, contents: Iterable[bytes]) -> None:
        """Somebody has these now."""
        hashes = [self._hash(content) for content in contents]
        if hashes:
            # Good enough to tell which are the oldest, whatever process says it.
            now_s = int(time.time())
            words = [word for each in hashes for word in (now_s, each)]
            self._connection.call_many(
                [
                    # A Redis that came up empty has no secret: the next client must hash as this one does.
                    ("SET", SECRET, self._secret or b"", "NX"),
                    ("ZADD", CONTENTS, *words),
                    ("ZREMRANGEBYRANK", CONTENTS, 0, -1 - MAX_REMEMBERED),
                ]
            )

    def knows(self, content: bytes) -> bool:
        """Whether somebody had this lately."""
        return self._connection.call("ZSCORE", CONTENTS, self._hash(content)) is not None

    def _hash(self, content: bytes) -> bytes:
        if self._secret is None:
            self._connection.call("SET", SECRET, secrets.token_bytes(32), "NX")
            self._secret = bytes(self._connection.call("GET", SECRET))
        return hashlib.blake2b(content, digest_size=_HASH_BYTES, key=self._secret).digest()
