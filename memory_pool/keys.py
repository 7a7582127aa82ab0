"""The only place where a block gets its name.

A name is 32 bytes: a 4-byte placement tag and 28 bytes of a chained SHA-256. The chain starts from a root made of the
model's fingerprint, the namespace and the caller's salt, and each link takes in one block of token ids, so equal names
mean the same tokens after the same prefix, under the same weights, in the same namespace. A namespace is chosen by the
server from the caller's identity and never taken from a request; a salt that a caller sends only narrows further who
finds its blocks, and changes neither namespace nor quota.

The first blocks of a chain may lie in the shared region (`num_shared_blocks`): prefixes that an administrator opened
to all. Behind them the chain branches off into the caller's own names.

The tag says where the block lives. Neighbours of a chain carry the same tag, which Redis Cluster maps to one slot: a
prefix is read in a few pipelines. A new tag every `SEGMENT_BLOCKS` blocks spreads one long prefix over the servers;
the first segment is short because most chats share their first blocks (the system prompt) and part after them.
"""

import hashlib
import re
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 32
TAG_BYTES = 4
SEGMENT_BLOCKS = 16
FIRST_SEGMENT_BLOCKS = 2

DEFAULT_NAMESPACE = "default"
SHARED_NAMESPACE = "shared"

TOKEN_BYTES = 4
_TOO_LARGE = "tokens must be between 0 and 2^32 - 1"
_ANYBODY = "any"
_SCHEME = b"cloudmatrix-kv-1"
_PLAIN_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def _length_prefixed(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)


def namespace_of(tenant_id: str | None) -> str:
    """The namespace that a tenant's blocks belong to and are charged to; None: no tenants are told apart.

    No two tenants have the same one, and no tenant's is that of the shared region.
    """
    if tenant_id is None:
        return DEFAULT_NAMESPACE
    if _PLAIN_TENANT.fullmatch(tenant_id):
        return f"tenant:{tenant_id}"
    return "tenant-sha256:" + hashlib.sha256(_length_prefixed(b"tenant", tenant_id.encode())).hexdigest()


def chain_root(*, fingerprint: str, namespace: str, salt: str = "") -> bytes:
    """What a chain of blocks starts from: 32 bytes. Fields are length-prefixed: `("ab", "c")` is not `("a", "bc")`."""
    fields = [_SCHEME, fingerprint.encode(), namespace.encode()]
    if salt:
        fields.append(salt.encode())
    return hashlib.sha256(_length_prefixed(*fields)).digest()


def starts_segment(index: int) -> bool:
    """Whether the block at `index` of a chain begins a new placement tag."""
    return index == 0 or (
        index >= FIRST_SEGMENT_BLOCKS and (index - FIRST_SEGMENT_BLOCKS) % SEGMENT_BLOCKS == 0
    )


def block_keys(
    tokens: Sequence[int] | npt.NDArray[np.integer],
    *,
    block_tokens: int,
    fingerprint: str,
    namespace: str,
    salt: str = "",
    num_shared_blocks: int = 0,
) -> list[bytes]:
    """Names of the full blocks of a token sequence, first to last; a partly filled last block has none.

    Raises ValueError when a token id does not fit 32 bits or `block_tokens` is not positive.
    """
    if block_tokens <= 0:
        raise ValueError(f"block_tokens must be positive, not {block_tokens}")
    data = _token_bytes(tokens)
    step = block_tokens * TOKEN_BYTES
    own = chain_root(fingerprint=fingerprint, namespace=namespace, salt=salt)
    digest = chain_root(fingerprint=fingerprint, namespace=SHARED_NAMESPACE) if num_shared_blocks else own
    tag = b""
    keys: list[bytes] = []
    for index in range(len(data) // step):
        if num_shared_blocks and index == num_shared_blocks:
            digest = hashlib.sha256(_length_prefixed(b"branch", own, digest)).digest()
        digest = hashlib.sha256(digest + data[index * step : (index + 1) * step]).digest()
        if starts_segment(index):
            tag = digest[:TAG_BYTES]
        keys.append(tag + digest[TAG_BYTES:])
    return keys


def _token_bytes(tokens: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """Token ids as 32-bit words, little end first. Raises ValueError when one does not fit."""
    if isinstance(tokens, np.ndarray):
        if tokens.size and (tokens.min() < 0 or tokens.max() > 0xFFFFFFFF):
            raise ValueError(_TOO_LARGE)
        return tokens.astype("<u4").tobytes()
    try:
        # NumPy takes at least thrice the time for a list.
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error:
        raise ValueError(_TOO_LARGE) from None


def content_keys(
    tokens: Sequence[int] | npt.NDArray[np.integer], *, block_tokens: int, fingerprint: str
) -> list[bytes]:
    """Names of the full blocks of a token sequence whoever wrote them. No block is stored under such a name."""
    return block_keys(tokens, block_tokens=block_tokens, fingerprint=fingerprint, namespace=_ANYBODY)


def namespace_at(index: int, *, namespace: str, num_shared_blocks: int) -> str:
    """The namespace of the block at `index` of a chain."""
    return SHARED_NAMESPACE if index < num_shared_blocks else namespace


def tail_key(request_id: str, namespace: str) -> bytes:
    """Name of the partly filled last block of one request: 32 bytes, never equal to a block of a chain."""
    return hashlib.sha256(_length_prefixed(b"tail", namespace.encode(), request_id.encode())).digest()


def tag_of(key: bytes) -> bytes:
    """The placement tag of a name."""
    return key[:TAG_BYTES]
