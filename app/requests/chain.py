"""The names of a prompt's blocks in the pool, as the caller's namespace, salt and the shared region make them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.protocol import WorkerRecord
from memory_pool.keys import block_keys
from memory_pool.shared_prefixes import SharedPrefix, num_shared_blocks


@dataclass(frozen=True, slots=True)
class Chain:
    """The names of a prompt's full blocks, the first `num_shared_blocks` of them in the shared region."""

    keys: list[bytes]
    num_shared_blocks: int


def chain_of(
    tokens: Sequence[int],
    layout: WorkerRecord,
    prefixes: Mapping[str, SharedPrefix],
    *,
    namespace: str,
    salt: str = "",
) -> Chain:
    """The chain of a prompt for workers of one `layout`, with these prefixes open to all. Pure."""
    block_tokens, fingerprint = layout.block_tokens, layout.fingerprint
    num_shared = num_shared_blocks(
        tokens, prefixes.values(), block_tokens=block_tokens, fingerprint=fingerprint
    )
    keys = block_keys(
        tokens,
        block_tokens=block_tokens,
        fingerprint=fingerprint,
        namespace=namespace,
        salt=salt,
        num_shared_blocks=num_shared,
    )
    return Chain(keys, num_shared)
