"""GGUF container: metadata and where each tensor's bytes lie (GGUF versions 2 and 3, little-endian)."""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from engine.weights.errors import ModelFileError
from engine.weights.tensor import U8

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMPY_TYPES = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMS = 4

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    30: ("bf16", 1, 2),
}
"""GGUF tensor type number: our kind, values per block, bytes per block."""

Value = str | int | float | bool | list["Value"]
T = TypeVar("T", str, int, float, bool, list[Value])


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor in the file, of any readable kind. `shape` has rows first (the file has columns first)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: U8


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """An opened file: `metadata` by key, `tensors` by name as views of the mapped file.

    `tensors_at`: the byte where the list of tensors begins, behind the metadata.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, RawTensor]
    tensors_at: int

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Metadata value of `key`. Raises ModelFileError when absent (without default) or of another type."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelFileError(f"{self.path}: metadata has no {key!r}; the file is not a complete model")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelFileError(
                f"{self.path}: metadata {key!r} should be of type {kind.__name__}, it is {value!r:.80}"
            )
        return value


class _Reader:
    """A cursor over the mapped file that refuses to run past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def take(self, num_bytes: int, what: str) -> bytes:
        end = self.at + num_bytes
        if end > len(self.data):
            raise ModelFileError(
                f"{self.path}: the file ends at byte {len(self.data)} inside {what}, which needs {end}: "
                "it is truncated or damaged; fetch it again"
            )
        part = self.data[self.at : end]
        self.at = end
        return part

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def string(self, what: str) -> str:
        return self.take(self.u64(what), what).decode("utf-8", errors="replace")

    def value(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            item, count = self.u32(what), self.u64(what)
            if item in _NUMPY_TYPES:
                dtype = np.dtype(_NUMPY_TYPES[item])
                numbers: list[Value] = np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
                return numbers
            return [self.value(item, what) for _ in range(count)]
        if kind not in _NUMPY_TYPES:
            raise ModelFileError(
                f"{self.path}: {what} has the unknown value type {kind}; the file is damaged"
            )
        dtype = np.dtype(_NUMPY_TYPES[kind])
        scalar: Value = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        return scalar


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file by mapping it; reads no tensor. Raises ModelFileError unless it is a whole one."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelFileError(f"{path}: cannot be read as a model file: {error}") from None
    reader = _Reader(path, data)
    if reader.take(min(4, len(data)), "magic") != _MAGIC:
        raise ModelFileError(f"{path}: not a GGUF file (its first bytes are not 'GGUF')")
    version = reader.u32("version")
    if version not in (2, 3):
        raise ModelFileError(f"{path}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
    num_tensors, num_keys = reader.u64("header"), reader.u64("header")
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = reader.string("metadata")
        metadata[key] = reader.value(reader.u32("metadata"), f"metadata {key!r}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelFileError(f"{path}: one part of a split model; join the parts into one file first")
    tensors_at = reader.at
    tensors = _tensors(reader, num_tensors, metadata.get("general.alignment", 32))
    return GgufFile(path, metadata, tensors, tensors_at)


def _tensors(reader: _Reader, count: int, alignment: Value) -> dict[str, RawTensor]:
    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name = reader.string("tensor list")
        num_dims = reader.u32(f"tensor {name!r}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ModelFileError(
                f"{reader.path}: tensor {name!r} has {num_dims} dimensions; the file is damaged"
            )
        dims = struct.unpack(f"<{num_dims}Q", reader.take(8 * num_dims, f"tensor {name!r}"))
        entries.append((name, dims[::-1], reader.u32(f"tensor {name!r}"), reader.u64(f"tensor {name!r}")))
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelFileError(
            f"{reader.path}: metadata 'general.alignment' is {alignment!r}; the file is damaged"
        )
    start = -(-reader.at // alignment) * alignment
    whole = np.frombuffer(reader.data, np.uint8)
    tensors: dict[str, RawTensor] = {}
    for name, shape, type_number, offset in entries:
        if type_number not in TENSOR_TYPES:
            known = ", ".join(kind.upper() for kind, _, _ in TENSOR_TYPES.values())
            raise ModelFileError(
                f"{reader.path}: tensor {name!r} has type number {type_number}, which is not supported; "
                f"take a file in one of {known}"
            )
        kind, block, block_bytes = TENSOR_TYPES[type_number]
        num_elements = int(np.prod(shape, dtype=object))
        if shape[-1] % block:
            raise ModelFileError(
                f"{reader.path}: rows of tensor {name!r} are not whole {kind} blocks of {block}"
            )
        begin = start + offset
        end = begin + num_elements // block * block_bytes
        if end > len(whole):
            raise ModelFileError(
                f"{reader.path}: truncated: tensor {name!r} ends at byte {end}, the file at {len(whole)}; "
                "fetch it again"
            )
        tensors[name] = RawTensor(name, kind, tuple(int(dim) for dim in shape), whole[begin:end])
    return tensors
