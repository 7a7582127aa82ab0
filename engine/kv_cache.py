"""A worker's local paged KV: whole blocks in one array, each block the pool's payload as it stands."""

import numpy as np
from numpy.typing import NDArray

from engine.config import KVLayout


class KVCache:
    """`blocks` is uint8[num_blocks, layout.block_bytes]; what a block means says `KVLayout`.

    Within a layer and KV head, K lies as [head_dim][block_tokens] and V as [block_tokens][head_dim].
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Raises ValueError unless there is at least one block, MemoryError when they do not fit."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}, expected at least 1")
        self.layout = layout
        raw = np.zeros(num_blocks * layout.block_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        self.blocks: NDArray[np.uint8] = raw[start : start + num_blocks * layout.block_bytes].reshape(
            num_blocks, layout.block_bytes
        )

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self.blocks)

    def block(self, index: int) -> memoryview:
        """One block's bytes, writable. Raises IndexError beyond the cache."""
        if not 0 <= index < len(self.blocks):
            raise IndexError(f"block {index} of {len(self.blocks)}")
        return memoryview(self.blocks[index])
