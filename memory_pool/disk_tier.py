"""The tier below DRAM: every complete block as a plain file, so that it outlives an eviction and a Redis restart.

One process (the keeper) writes and evicts; any process reads. A file appears whole under its name or not at all
(written aside, then renamed). A reader marks what it used through the file's time, which is how the keeper learns the
order of use. A disk that is full, read-only or gone costs misses and counted failures, nothing else; where others
filled it, the tier gives up its own oldest blocks for the newest.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from memory_pool.books import check_namespace
from memory_pool.eviction import LruIndex
from memory_pool.keys import KEY_BYTES

Place = tuple[str, bytes]
"""Namespace and key of a block."""

_PARTIAL = ".partial"


class DiskReader:
    """What workers and the gateway see of the tier. Thread-safe. No verb raises because of the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def contains(self, namespace: str, key: bytes) -> bool:
        """Whether the block is here."""
        try:
            return self.path(namespace, key).exists()
        except OSError:
            return False

    def read_into(self, namespace: str, key: bytes, into: Sequence[memoryview]) -> int | None:
        """The length of the value, None where there is none. Buffers are filled only where it fits them."""
        path = self.path(namespace, key)
        try:
            with path.open("rb", buffering=0) as file:
                length = os.fstat(file.fileno()).st_size
                if length == sum(part.nbytes for part in into):
                    for part in into:
                        done = 0
                        while done < part.nbytes:
                            count = file.readinto(part[done:])
                            if not count:
                                return done
                            done += count
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return length

    def read(self, namespace: str, key: bytes) -> bytes | None:
        """The whole value, None where there is none."""
        try:
            return self.path(namespace, key).read_bytes()
        except OSError:
            return None

    def delete(self, namespace: str, key: bytes) -> None:
        """Remove a block that turned out damaged; the keeper notices."""
        with contextlib.suppress(OSError):
            self.path(namespace, key).unlink()

    def delete_all(self, namespace: str) -> int:
        """Remove a namespace's blocks, also those that only the disk has; how many there were."""
        folder = self.folder / check_namespace(namespace)
        count = sum(len(path.name) == 2 * KEY_BYTES for path in folder.glob("??/*"))
        shutil.rmtree(folder, ignore_errors=True)
        return count

    def path(self, namespace: str, key: bytes) -> Path:
        """Where a block lies."""
        name = key.hex()
        return self.folder / check_namespace(namespace) / name[:2] / name


class DiskTier(DiskReader):
    """The writer's side: capped at `capacity_bytes`, least recently used out first. Used by one thread."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        super().__init__(folder)
        self.capacity_bytes = capacity_bytes
        self.num_evicted = 0
        self.num_failures = 0
        self._index: LruIndex[Place] = LruIndex()
        self._used_at: dict[Place, float] = {}
        self._was_there = folder.is_dir()
        self._load()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks here."""
        return self._index.used_bytes

    def write(self, namespace: str, key: bytes, value: bytes) -> bool:
        """Keep a block, making room for it; False, and counted, when the disk does not take it."""
        place = (namespace, key)
        if place in self._index and self.contains(namespace, key):
            self._index.touch(place)
            return True
        if len(value) > self.capacity_bytes:
            return False
        self._make_room(len(value), self.capacity_bytes)
        path = self.path(namespace, key)
        failure = self._write(path, value)
        if failure is not None and failure.errno == errno.ENOSPC and len(self._index):
            self._make_room(len(value), self.used_bytes)
            failure = self._write(path, value)
        if failure is not None:
            self.num_failures += 1
            return False
        self._index.insert(place, len(value))
        with contextlib.suppress(OSError):
            self._used_at[place] = path.stat().st_mtime
        return True

    def refresh(self) -> None:
        """Learn what somebody else removed (a damaged block, a purged namespace), or that the folder is back."""
        is_there = self.folder.is_dir()
        if is_there and not self._was_there:
            self._index, self._used_at = LruIndex(), {}
            self._load()
        else:
            for place in [place for place in self._used_at if not self.contains(*place)]:
                self._forget(place)
        self._was_there = is_there

    def _write(self, path: Path, value: bytes) -> OSError | None:
        aside = path.with_suffix(_PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(value)
            aside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            return error
        return None

    def _make_room(self, num_bytes: int, capacity_bytes: int) -> None:
        while self.used_bytes + num_bytes > capacity_bytes and len(self._index):
            (place,) = self._index.victims(1, 0.0)
            try:
                used_at = self.path(*place).stat().st_mtime
            except OSError:
                self._forget(place)
                continue
            if used_at > self._used_at.get(place, used_at):
                # Read since we last looked: it is not the least recently used after all.
                self._used_at[place] = used_at
                self._index.touch(place)
                continue
            self._drop(place)
            self.num_evicted += 1

    def _drop(self, place: Place) -> None:
        self.delete(*place)
        self._forget(place)

    def _forget(self, place: Place) -> None:
        self._index.remove(place)
        self._used_at.pop(place, None)

    def _load(self) -> None:
        """Take over what an earlier keeper left, oldest use first; unfinished files go."""
        found: list[tuple[float, int, Place]] = []
        for path in self.folder.glob("*/??/*"):
            with contextlib.suppress(OSError, ValueError):
                if path.suffix == _PARTIAL:
                    path.unlink(missing_ok=True)
                    continue
                key = bytes.fromhex(path.name)
                if len(key) == KEY_BYTES:
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, (path.parts[-3], key)))
        for used_at, size, place in sorted(found):
            self._index.insert(place, size)
            self._used_at[place] = used_at
        self._make_room(0, self.capacity_bytes)
