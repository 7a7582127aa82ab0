"""The codec of one block: header, payload and trailer, stored as ONE value, so that it is there whole or not at all.

Header (little-endian): magic, version, length of the header, number of tokens, bytes of payload, the KV layout
(layers, KV heads, head size, tokens per block), data type, fingerprint, key; then the token ids, 4 bytes each. A reader
knows it all beforehand, so verifying it is one comparison. Trailer: XXH3-64 of the payload. It comes last so that both
sides compute it while the payload is under way.
"""

import enum
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from memory_pool.keys import KEY_BYTES

MAGIC = b"CMKV"
VERSION = 2

_FIXED = struct.Struct("<4sHIIQ HHHH 16s 32s 32s")
_CHECKSUM = struct.Struct("<Q")
TRAILER_BYTES = _CHECKSUM.size

Tokens = Sequence[int] | npt.NDArray[np.integer]


class Damage(enum.StrEnum):
    """Why a value is not the block that was asked for."""

    TRUNCATED = "truncated"
    """Shorter or longer than the block."""
    FOREIGN = "foreign"
    """Whole, but of other tokens, another model, layout or key."""
    CORRUPT = "corrupt"
    """Header or payload bytes have changed."""


def intact(value: bytes) -> bool:
    """Whether a stored value is a whole, undamaged block of whatever model: for those who move blocks unread."""
    if len(value) < _FIXED.size:
        return False
    magic, version, header_bytes, _, payload_bytes, *_ = _FIXED.unpack_from(value)
    if (magic, version) != (MAGIC, VERSION) or len(value) != header_bytes + payload_bytes + TRAILER_BYTES:
        return False
    payload, trailer = memoryview(value)[header_bytes:-TRAILER_BYTES], value[-TRAILER_BYTES:]
    return bool(_CHECKSUM.pack(xxhash.xxh3_64_intdigest(payload)) == trailer)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """What every block of one model has in common. `fingerprint` stands for weights, numerics and KV layout."""

    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    payload_bytes: int
    dtype: str = "i12"

    def header_bytes(self, num_tokens: int) -> int:
        """Length of the header of a block that holds `num_tokens` tokens."""
        return _FIXED.size + 4 * num_tokens

    def value_bytes(self, num_tokens: int) -> int:
        """Length of the stored value: header, payload and trailer."""
        return self.header_bytes(num_tokens) + self.payload_bytes + TRAILER_BYTES

    def encode(self, key: bytes, tokens: Tokens, payload: bytes | memoryview) -> Iterator[bytes | memoryview]:
        """The value of a block piece by piece: header, payload, trailer.

        Raises ValueError when sizes do not fit the format.
        """
        if memoryview(payload).nbytes != self.payload_bytes:
            raise ValueError(
                f"payload has {memoryview(payload).nbytes} bytes, the format {self.payload_bytes}"
            )
        return self._pieces(self._header(key, tokens), memoryview(payload).cast("B"))

    def verify(
        self,
        key: bytes,
        tokens: Tokens,
        header: memoryview,
        payload: memoryview,
        trailer: memoryview,
        checksum: int | None = None,
    ) -> Damage | None:
        """None when header, payload and trailer are the block of `tokens` under `key`, else what is wrong.

        `checksum`: XXH3-64 of the payload, where it was computed while the payload arrived.
        """
        expected = self._header(key, tokens)
        if header == expected:
            found = xxhash.xxh3_64_intdigest(payload) if checksum is None else checksum
            return None if _CHECKSUM.pack(found) == trailer else Damage.CORRUPT
        if header[:6] != expected[:6]:
            return Damage.CORRUPT
        return Damage.FOREIGN

    @staticmethod
    def _pieces(header: bytes, payload: memoryview) -> Iterator[bytes | memoryview]:
        yield header
        yield payload
        # Read once more while the server takes it from the socket.
        yield _CHECKSUM.pack(xxhash.xxh3_64_intdigest(payload))

    def _header(self, key: bytes, tokens: Tokens) -> bytes:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        if not 0 < len(tokens) <= self.block_tokens:
            raise ValueError(f"a block holds 1 to {self.block_tokens} tokens, not {len(tokens)}")
        return (
            _FIXED.pack(
                MAGIC,
                VERSION,
                self.header_bytes(len(tokens)),
                len(tokens),
                self.payload_bytes,
                self.num_layers,
                self.num_kv_heads,
                self.head_dim,
                self.block_tokens,
                self.dtype.encode(),
                hashlib.sha256(self.fingerprint.encode()).digest(),
                key,
            )
            + np.asarray(tokens).astype("<u4").tobytes()
        )
