"""Who holds a block: while anybody does, it is not evicted. Pure: instants are passed in."""

from memory_pool.scripts import PIN_PREFIX


class LeaseTable:
    """Leases by block and holder, each with the instant at which it runs out by itself. A pin is a long lease."""

    def __init__(self) -> None:
        self._until: dict[bytes, dict[str, float]] = {}

    def lease(self, key: bytes, holder: str, until: float) -> None:
        """Hold a block until an instant; a later call by the same holder replaces the earlier."""
        self._until.setdefault(key, {})[holder] = until

    def release(self, key: bytes, holder: str) -> None:
        """Let go. Unknown leases are ignored."""
        holders = self._until.get(key)
        if holders is not None:
            holders.pop(holder, None)
            if not holders:
                del self._until[key]

    def is_leased(self, key: bytes, now: float, *, but_pins: bool = False) -> bool:
        """Whether anybody holds the block, or anything but a pin."""
        return any(
            until > now and not (but_pins and holder.startswith(PIN_PREFIX))
            for holder, until in self._until.get(key, {}).items()
        )

    def sweep(self, now: float) -> int:
        """Forget leases that ran out; how many."""
        out = [
            (key, holder)
            for key, holders in self._until.items()
            for holder, end in holders.items()
            if end <= now
        ]
        for key, holder in out:
            self.release(key, holder)
        return len(out)
