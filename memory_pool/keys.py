"""The only place where a block gets its name.

A name is 32 bytes: a 4-byte placement tag and 28 bytes of a chained SHA-256. The chain starts from a salt made of the
model's fingerprint and the namespace, and each link takes in one block of token ids, so equal names mean the same
tokens after the same prefix, under the same weights, in the same namespace. A namespace is chosen by the server from
the caller's identity and never taken from a request.

The tag says where the block lives. Neighbours of a chain carry the same tag, which Redis Cluster maps to one slot: a
prefix is read in a few pipelines. A new tag every `SEGMENT_BLOCKS` blocks spreads one long prefix over the servers;
the first segment is short because most chats share their first blocks (the system prompt) and part after them.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 32
TAG_BYTES = 4
SEGMENT_BLOCKS = 16
FIRST_SEGMENT_BLOCKS = 2

_SCHEME = b"cloudmatrix-kv-1"


def _length_prefixed(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)


def namespace_of(*fields: str) -> str:
    """A namespace's name from the identity it stands for, e.g. `namespace_of(organisation, project)`.

    Fields are length-prefixed before hashing, so `("org_1", "2345")` and `("org_12345", "")` differ. 32 hex digits.
    """
    return hashlib.sha256(_length_prefixed(b"namespace", *(f.encode() for f in fields))).hexdigest()[:32]


def chain_root(*, fingerprint: str, namespace: str) -> bytes:
    """The salt a chain of blocks starts from: 32 bytes."""
    return hashlib.sha256(_length_prefixed(_SCHEME, fingerprint.encode(), namespace.encode())).digest()


def starts_segment(index: int) -> bool:
    """Whether the block at `index` of a chain begins a new placement tag."""
    return index == 0 or (
        index >= FIRST_SEGMENT_BLOCKS and (index - FIRST_SEGMENT_BLOCKS) % SEGMENT_BLOCKS == 0
    )


def block_keys(
    tokens: Sequence[int] | npt.NDArray[np.integer], *, block_tokens: int, fingerprint: str, namespace: str
) -> list[bytes]:
    """Names of the full blocks of a token sequence, first to last; a partly filled last block has none.

    Raises ValueError when a token id does not fit 32 bits or `block_tokens` is not positive.
    """
    if block_tokens <= 0:
        raise ValueError(f"block_tokens must be positive, not {block_tokens}")
    ids = np.asarray(tokens, dtype=np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > 0xFFFFFFFF):
        raise ValueError("tokens must be between 0 and 2^32 - 1")
    data = ids.astype("<u4").tobytes()
    step = block_tokens * 4
    digest = chain_root(fingerprint=fingerprint, namespace=namespace)
    tag = b""
    keys: list[bytes] = []
    for index in range(len(ids) // block_tokens):
        digest = hashlib.sha256(digest + data[index * step : (index + 1) * step]).digest()
        if starts_segment(index):
            tag = digest[:TAG_BYTES]
        keys.append(tag + digest[TAG_BYTES:])
    return keys


def tail_key(request_id: str) -> bytes:
    """Name of the partly filled last block of one request: 32 bytes, never equal to a block of a chain."""
    return hashlib.sha256(_length_prefixed(b"tail", request_id.encode())).digest()


def tag_of(key: bytes) -> bytes:
    """The placement tag of a name."""
    return key[:TAG_BYTES]
