"""A GGUF file with its Q4_1 tensors turned to Q4_0: what a peer without a fast kernel for Q4_1 would be run on.

Quick there and damaged: four bits without an offset, rounded a second time. It serves for speed comparisons alone.
"""

import struct
from pathlib import Path

import numpy as np

from engine.weights.gguf import TENSOR_TYPES, RawTensor, read_gguf
from engine.weights.tensor import F32, U8, Tensor, dequantise

_TYPE_NUMBERS = {kind: number for number, (kind, _, _) in TENSOR_TYPES.items()}
_BLOCK = 32


def quantise_q4_0(values: F32) -> U8:
    """Raw q4_0 blocks, flat uint8: runs of 32 values, each with an f16 scale; the value furthest from zero is -8."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, _BLOCK)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scales = (furthest / np.float32(-8)).astype(np.float16)
    divisors = scales.astype(np.float32)
    divisors[divisors == 0] = 1
    quants = np.clip(np.rint(blocks / divisors) + 8, 0, 15).astype(np.uint8)
    halves = quants[:, : _BLOCK // 2] | quants[:, _BLOCK // 2 :] << 4
    return np.concatenate([scales.view(np.uint8), halves], axis=1).reshape(-1)


def requantise(source: Path, target: Path) -> None:
    """Write `source` to `target` with Q4_0 in place of Q4_1. Raises ModelFileError when it cannot be read."""
    file = read_gguf(source)
    alignment = file.get("general.alignment", int, 32)
    tensors = [_as_q4_0(tensor) for tensor in file.tensors.values()]
    entries, offset = [], 0
    for tensor in tensors:
        name = tensor.name.encode()
        dims = tensor.shape[::-1]
        entries.append(
            struct.pack("<Q", len(name))
            + name
            + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _TYPE_NUMBERS[tensor.kind], offset)
        )
        offset += -(-tensor.data.nbytes // alignment) * alignment
    with target.open("wb") as out:
        with source.open("rb") as original:
            out.write(original.read(file.tensors_at))
        out.writelines(entries)
        for tensor in tensors:
            out.write(bytes(-out.tell() % alignment))
            out.write(tensor.data.tobytes())


def _as_q4_0(tensor: RawTensor) -> RawTensor:
    if tensor.kind != "q4_1":
        return tensor
    values = dequantise(Tensor(tensor.name, tensor.kind, tensor.shape, tensor.data))
    return RawTensor(tensor.name, "q4_0", tensor.shape, quantise_q4_0(values))
