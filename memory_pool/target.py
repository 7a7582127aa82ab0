"""Where the bytes of a value go as they arrive: a buffer, or one whose checksum is computed on the way."""

from dataclasses import dataclass
from typing import Protocol


class Digest(Protocol):
    """A running checksum, such as `xxhash.xxh3_64`."""

    def reset(self) -> None:
        """Begin anew."""
        ...

    def update(self, data: memoryview, /) -> None:
        """The bytes that come next."""
        ...


@dataclass(frozen=True, slots=True)
class Checked:
    """A buffer whose checksum is fed piece by piece, while the bytes are still in the cache."""

    view: memoryview
    digest: Digest

    def __len__(self) -> int:
        return len(self.view)


Target = memoryview | Checked
