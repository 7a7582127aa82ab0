"""safetensors container: where each tensor's bytes lie, over one file or the shards that an index names."""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.weights.errors import ModelFileError
from engine.weights.tensor import KINDS, U8

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor of the folder under its own name; `data` is a view of the mapped file, row by row."""

    kind: str
    shape: tuple[int, ...]
    data: U8


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights. Raises ModelFileError when there are none or a shard is missing."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not (folder / _INDEX).exists():
        raise ModelFileError(
            f"{folder}: holds neither {_SINGLE} nor {_INDEX}; "
            "give a GGUF file or a Hugging Face folder with safetensors"
        )
    names = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelFileError(f"{folder / _INDEX}: has no 'weight_map' of tensors to files")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or not file.exists():
            raise ModelFileError(
                f"{folder / _INDEX}: names the file {file.name!r}, which is missing; fetch it again"
            )
    return files


def read_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """All tensors of the files, mapped, not read. Raises ModelFileError naming a damaged file or unusable tensor."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _read_file(file)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelFileError when the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; the folder is not a whole Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: should hold a JSON object")
    return content


def _read_file(path: Path) -> dict[str, StoredTensor]:
    """A file is the header's length (8 bytes, little-endian), the header (JSON), and the tensors' bytes."""
    try:
        with path.open("rb") as file:
            whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read as a model file: {error}") from None
    header_bytes = int.from_bytes(whole[:8].tobytes(), "little")
    start = 8 + header_bytes
    if start > len(whole):
        raise ModelFileError(
            f"{path}: truncated inside its header, or not a safetensors file; fetch it again"
        )
    try:
        header = json.loads(whole[8:start].tobytes())
        return {
            name: _stored(path, name, whole[start:], entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path}: its header is damaged, or it is not a safetensors file") from None


def _stored(path: Path, name: str, data: U8, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if dtype not in _DTYPES:
        raise ModelFileError(
            f"{path}: tensor {name!r} is {dtype}; weights must be one of {', '.join(_DTYPES)}"
        )
    kind = _DTYPES[dtype]
    if not 0 <= begin <= end or end - begin != int(np.prod(shape, dtype=object)) * KINDS[kind].num_bytes:
        raise ModelFileError(f"{path}: tensor {name!r} does not fill its place; the file is damaged")
    if end > len(data):
        raise ModelFileError(
            f"{path}: truncated: tensor {name!r} ends beyond the end of the file; fetch it again"
        )
    return StoredTensor(kind, shape, data[begin:end])
