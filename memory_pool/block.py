"""The codec of one block: a header and the payload, stored as ONE value, so that a block is there whole or not at all.

Header (little-endian): magic, version, length of the header, number of tokens, bytes of payload, the KV layout
(layers, KV heads, head size, tokens per block), data type, fingerprint, key, XXH3-64 of the payload; then the token
ids, 4 bytes each. Everything but the checksum is known to a reader beforehand, so verifying is one comparison of the
header plus one checksum of the payload (XXH3 runs at memory speed and releases the GIL).
"""

import enum
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from memory_pool.keys import KEY_BYTES

MAGIC = b"CMKV"
VERSION = 1

_FIXED = struct.Struct("<4sHIIQ HHHH 16s 32s 32s Q")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = _FIXED.size - _CHECKSUM.size

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
    magic, version, header_bytes, _, payload_bytes, *_, checksum = _FIXED.unpack_from(value)
    if (magic, version) != (MAGIC, VERSION) or len(value) != header_bytes + payload_bytes:
        return False
    return bool(xxhash.xxh3_64_intdigest(memoryview(value)[header_bytes:]) == checksum)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """What every block of one model has in common. `fingerprint` stands for weights, numerics and KV layout."""

    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    payload_bytes: int
    dtype: str = "f16"

    def header_bytes(self, num_tokens: int) -> int:
        """Length of the header of a block that holds `num_tokens` tokens."""
        return _FIXED.size + 4 * num_tokens

    def value_bytes(self, num_tokens: int) -> int:
        """Length of the stored value: header and payload."""
        return self.header_bytes(num_tokens) + self.payload_bytes

    def encode_header(self, key: bytes, tokens: Tokens, payload: bytes | memoryview) -> bytes:
        """The header of `payload`, with its checksum. Raises ValueError when sizes do not fit the format."""
        if memoryview(payload).nbytes != self.payload_bytes:
            raise ValueError(
                f"payload has {memoryview(payload).nbytes} bytes, the format {self.payload_bytes}"
            )
        return self._header(key, tokens, xxhash.xxh3_64_intdigest(payload))

    def verify(self, key: bytes, tokens: Tokens, header: memoryview, payload: memoryview) -> Damage | None:
        """None when header and payload are the block of `tokens` under `key`, else what is wrong."""
        (checksum,) = _CHECKSUM.unpack_from(header, _CHECKSUM_AT)
        expected = self._header(key, tokens, checksum)
        if header == expected:
            return None if xxhash.xxh3_64_intdigest(payload) == checksum else Damage.CORRUPT
        if header[:6] != expected[:6]:
            return Damage.CORRUPT
        return Damage.FOREIGN

    def _header(self, key: bytes, tokens: Tokens, checksum: int) -> bytes:
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
                checksum,
            )
            + np.asarray(tokens).astype("<u4").tobytes()
        )
