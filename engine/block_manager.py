"""Who holds which block of the local paged KV cache. Pure bookkeeping: block numbers and names, never bytes.

    free -> used (one holder or many) -> free                     the block never got a name
                                      -> idle -> used             named: its KV is kept for the next who wants it
                                              -> free             the least recently used idle block gives way

A block gets its name when all its tokens are computed and is never written to again until it is free. A holder is a
sequence, a prefetch or a transfer that reads or writes the block's memory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockManager:
    """Allocation of `num_blocks` blocks of `block_tokens` tokens each."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"num_blocks and block_tokens must be positive, not {num_blocks} and {block_tokens}"
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_evicted = 0
        self._holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in order of last use

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks with a holder."""
        return self.num_blocks - self.num_available

    @property
    def num_idle(self) -> int:
        """Named blocks without a holder."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_tokens)

    def find(self, key: bytes) -> int | None:
        """The block of that name."""
        return self._block_of.get(key)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the leading names that are here. They are not held yet."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_available_beside(self, blocks: Iterable[int]) -> int:
        """Blocks that could still be allocated once `blocks` are held."""
        return self.num_available - sum(1 for block in blocks if not self._holders[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """Become a holder of blocks that are used or idle."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with the caller as their holder, or None (and no change) when there are not as many."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Stop holding blocks; pass those of a sequence in order, so that its last blocks are reused first."""
        for block in reversed(list(blocks)):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def seal(self, block: int, key: bytes) -> None:
        """Name a held block whose tokens are all computed. A name keeps its first block: a double stays nameless."""
        if self._holders[block] < 1:
            raise ValueError(f"block {block} is named but nobody holds it")
        if self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget_idle(self) -> int:
        """Free every idle block, so that no cached KV remains; how many there were."""
        count = len(self._idle)
        for block in list(self._idle):
            self._unname(block)
            self._free.append(block)
        self._idle.clear()
        return count

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books balance with `holders`, the blocks of each holder there is."""
        expected = Counter(block for blocks in holders for block in blocks)
        for block, count in enumerate(self._holders):
            assert count == expected[block], (
                f"block {block}: {count} holders in the books, {expected[block]} in fact"
            )
            places = (count > 0) + (block in self._idle)
            assert places <= 1, f"block {block} is used and idle"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._idle.keys(), "a block is free and idle"
        assert all(not self._holders[block] and self._key_of[block] is None for block in free), (
            "a free block is in use"
        )
        assert all(self._key_of[block] is not None for block in self._idle), "an idle block has no name"
        assert len(free) + len(self._idle) + sum(count > 0 for count in self._holders) == self.num_blocks
        named = {key: block for block, key in enumerate(self._key_of) if key is not None}
        assert named == self._block_of, "names and blocks disagree"

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._unname(block)
            self.num_evicted += 1
        self._holders[block] = 1
        return block

    def _unname(self, block: int) -> None:
        key = self._key_of[block]
        assert key is not None
        self._key_of[block] = None
        del self._block_of[key]
