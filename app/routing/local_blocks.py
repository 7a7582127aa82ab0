"""Which prompts' KV lies in which worker's own cache, as far as gateways saw it being computed there (pure)."""

from collections import OrderedDict
from collections.abc import Sequence

MAX_LOCAL_BLOCKS = 8192
"""Block keys remembered per worker, at most."""
RETELL_S = 10.0
"""After which a block that is used again is told to the other gateways again, so that they do not forget it."""


class LocalBlocks:
    """Keys by worker, the least recently used ones forgotten first."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[bytes, float]] = {}

    @property
    def num_blocks(self) -> int:
        """Of all workers."""
        return sum(map(len, self._blocks.values()))

    def remember(self, worker_id: str, block_keys: Sequence[bytes], limit: int, now: float) -> list[bytes]:
        """A worker with room for `limit` blocks has these now; returned are those worth telling others, in order."""
        blocks = self._blocks.setdefault(worker_id, OrderedDict())
        fresh = [key for key in block_keys if now - blocks.get(key, float("-inf")) >= RETELL_S]
        for key in reversed(block_keys):  # the first block of a chain ends as the most recent: it goes last
            blocks.setdefault(key, now)
            blocks.move_to_end(key)
        blocks.update(dict.fromkeys(fresh, now))
        while len(blocks) > min(MAX_LOCAL_BLOCKS, limit):
            blocks.popitem(last=False)
        return fresh

    def count(self, worker_id: str, block_keys: Sequence[bytes]) -> int:
        """How many of a prompt's leading blocks the worker has."""
        blocks = self._blocks.get(worker_id)
        if not blocks:
            return 0
        for number, key in enumerate(block_keys):
            if key not in blocks:
                return number
        return len(block_keys)
