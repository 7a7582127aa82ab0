"""Model weights in the pool: one copy in DRAM for all workers, so that a start or a switch of model is a fetch.

A model is a file under a name and a version (the digest of its content). It is cut into blocks that lie in the pool
beside KV, without a time to live, so that models go as a whole, least recently used first, and never in part. A
manifest, written last, names the blocks: a model is there completely or not at all. Every block is verified by its
checksum; a model with a damaged or missing block is dropped and must come from its origin again.
"""

import functools
import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from memory_pool.eviction import LruIndex
from memory_pool.redis_store import RedisStore, redis_key
from memory_pool.store import Get, Put, StoreError

BLOCK_BYTES = 4 << 20
MANIFESTS = "cm:models"

_FOR_EVER_S = 10 * 365 * 86_400.0
_BATCH = 8


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the pool. `checksums`: XXH3-64 of each block; `used_at_ms`: last use on Redis's clock."""

    name: str
    version: str
    num_bytes: int
    checksums: list[int]
    used_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    key: bytes
    start: int
    num_bytes: int


class ModelCache:
    """Thread-safe. Verbs never raise because of the pool: a pool that cannot be asked holds no model."""

    def __init__(self, url: str, *, capacity_bytes: int) -> None:
        self._store = RedisStore(url)
        self._capacity_bytes = capacity_bytes
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="model-prefetch")

    def models(self) -> list[Manifest]:
        """What is in the pool, most recently used first."""
        try:
            found = self._manifests()
        except StoreError:
            return []
        return sorted(found, key=lambda manifest: -manifest.used_at_ms)

    def publish(self, name: str, version: str, path: Path) -> bool:
        """Put a model file into the pool, at the cost of those least recently used; False when it has no room.

        Raises OSError when the file cannot be read.
        """
        size = path.stat().st_size
        if not 0 < size <= self._capacity_bytes:
            return False
        try:
            if any((each.name, each.version) == (name, version) for each in self._manifests()):
                return True
            self._make_room(size)
            checksums: list[int] = []
            pieces = list(_pieces(version, size))
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
                memoryview(content) as view,
            ):
                for start in range(0, len(pieces), _BATCH):
                    if not self._put(pieces[start : start + _BATCH], view, checksums):
                        self._drop_blocks(version, size)
                        return False
            self._note(
                Manifest(name=name, version=version, num_bytes=size, checksums=checksums, used_at_ms=0)
            )
        except StoreError:
            return False
        return True

    def fetch(self, name: str, version: str, into: Path) -> bool:
        """Write a model from the pool to a file, which appears whole or not at all; False when it is not there.

        Raises OSError when the file cannot be written.
        """
        aside = into.with_name(f"{into.name}.{os.getpid()}.partial")
        try:
            found = [each for each in self._manifests() if (each.name, each.version) == (name, version)]
            if not found:
                return False
            whole = self._read(found[0], aside)
            if not whole:
                self.drop(name, version)
                return False
            self._note(found[0])
            aside.replace(into)
        except StoreError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def prefetch(self, name: str, version: str, into: Path) -> "Future[bool]":
        """Fetch in the background, e.g. the model that will be wanted next."""
        return self._prefetcher.submit(self.fetch, name, version, into)

    def drop(self, name: str, version: str) -> bool:
        """Remove a model from the pool; whether it was there."""
        try:
            for manifest in self._manifests():
                if (manifest.name, manifest.version) == (name, version):
                    self._store.connection.call("HDEL", MANIFESTS, _field(name, version))
                    self._drop_blocks(version, manifest.num_bytes)
                    return True
        except StoreError:
            pass
        return False

    def close(self) -> None:
        """Wait for prefetches and release connections."""
        self._prefetcher.shutdown()
        self._store.close()

    def _manifests(self) -> list[Manifest]:
        return [
            msgspec.msgpack.decode(raw, type=Manifest)
            for raw in self._store.connection.call("HVALS", MANIFESTS)
        ]

    def _note(self, manifest: Manifest) -> None:
        seconds, micros = self._store.connection.call("TIME")
        used = msgspec.structs.replace(manifest, used_at_ms=int(seconds) * 1000 + int(micros) // 1000)
        field = _field(manifest.name, manifest.version)
        self._store.connection.call("HSET", MANIFESTS, field, msgspec.msgpack.encode(used))

    def _make_room(self, num_bytes: int) -> None:
        index: LruIndex[tuple[str, str]] = LruIndex()
        for manifest in sorted(self._manifests(), key=lambda each: each.used_at_ms):
            index.insert((manifest.name, manifest.version), manifest.num_bytes)
        for name, version in index.victims(index.used_bytes + num_bytes - self._capacity_bytes, 0.0):
            self.drop(name, version)

    def _put(self, pieces: list[_Piece], content: memoryview, checksums: list[int]) -> bool:
        puts: list[Put] = []
        for piece in pieces:
            block = content[piece.start : piece.start + piece.num_bytes]
            checksums.append(xxhash.xxh3_64_intdigest(block))
            puts.append(
                Put(piece.key, piece.num_bytes, functools.partial(_alone, block), _FOR_EVER_S, replace=True)
            )
        stored = all(self._store.put_many(puts))
        # Without a time to live Redis's own eviction passes them by.
        self._store.connection.call_many([("PERSIST", redis_key(piece.key)) for piece in pieces])
        return stored

    def _read(self, manifest: Manifest, into: Path) -> bool:
        pieces = list(_pieces(manifest.version, manifest.num_bytes))
        with into.open("wb+") as file:
            file.truncate(manifest.num_bytes)
            with mmap.mmap(file.fileno(), manifest.num_bytes) as content, memoryview(content) as view:
                for start in range(0, len(pieces), _BATCH):
                    batch = pieces[start : start + _BATCH]
                    targets = [view[piece.start : piece.start + piece.num_bytes] for piece in batch]
                    lengths = self._store.get_many(
                        [Get(p.key, [t]) for p, t in zip(batch, targets, strict=True)]
                    )
                    sums = manifest.checksums[start : start + _BATCH]
                    whole = all(
                        length == target.nbytes and xxhash.xxh3_64_intdigest(target) == checksum
                        for length, target, checksum in zip(lengths, targets, sums, strict=True)
                    )
                    for target in targets:
                        target.release()
                    if not whole:
                        return False
        return True

    def _drop_blocks(self, version: str, num_bytes: int) -> None:
        self._store.delete([piece.key for piece in _pieces(version, num_bytes)])


def _pieces(version: str, num_bytes: int) -> Iterator[_Piece]:
    for index, start in enumerate(range(0, num_bytes, BLOCK_BYTES)):
        key = hashlib.sha256(
            b"model-block\0" + version.encode() + b"\0" + index.to_bytes(8, "little")
        ).digest()
        yield _Piece(key=key, start=start, num_bytes=min(BLOCK_BYTES, num_bytes - start))


def _alone(block: memoryview) -> list[memoryview]:
    return [block]


def _field(name: str, version: str) -> str:
    return f"{name}@{version}"
