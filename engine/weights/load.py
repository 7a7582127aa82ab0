"""The one way from a path to a model's weights."""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.config import ModelConfig
from engine.weights import llama_folder, llama_gguf
from engine.weights.architecture import check_config, check_tensors
from engine.weights.gguf import read_gguf
from engine.weights.safetensors import read_tensors, weight_files
from engine.weights.tensor import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ModelWeights:
    """A model ready for the engine: `tensors` by canonical name, Q and K in interleaved-pair RoPE order.

    `digest` is the hex SHA-256 of the weights and their configuration as shipped.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    digest: str


def load_weights(path: Path) -> ModelWeights:
    """Read a model: weights stay memory-mapped where the engine computes with the kind as shipped.

    Raises ModelFileError, naming the file and what is wrong with it.
    """
    if path.is_dir():
        files = weight_files(path)
        config = llama_folder.config_of(path)
        check_config(path, config)
        tensors = {tensor.name: tensor for tensor in llama_folder.tensors_of(config, read_tensors(files))}
        files.append(path / "config.json")
    else:
        file = read_gguf(path)
        files = [path]
        config = llama_gguf.config_of(file)
        check_config(path, config)
        tensors = {tensor.name: tensor for tensor in llama_gguf.tensors_of(file)}
    check_tensors(path, config, tensors)
    return ModelWeights(config, tensors, content_digest(path, files))


def content_digest(path: Path, files: list[Path]) -> str:
    """Hex SHA-256 over the files' contents in the given order, remembered beside `path`.

    The remembered value counts as long as every file keeps its size and modification time. Where the folder
    cannot be written the digest is computed each time.
    """
    signature = [
        [file.name, status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]
    ]
    note = path.with_name(path.name + ".digest")
    with suppress(OSError, ValueError, TypeError, KeyError):
        remembered = json.loads(note.read_text())
        if remembered["files"] == signature:
            return str(remembered["sha256"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    with suppress(OSError):
        _write_atomically(note, json.dumps({"sha256": digest.hexdigest(), "files": signature}))
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
