"""One weight matrix or vector as it lies in the file, and its plain float32 value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


class BlockFormat(NamedTuple):
    """A kind stores `elements` consecutive values of a row in `num_bytes` bytes."""

    elements: int
    num_bytes: int


KINDS: dict[str, BlockFormat] = {
    "f32": BlockFormat(1, 4),
    "f16": BlockFormat(1, 2),
    "bf16": BlockFormat(1, 2),
    "q8_0": BlockFormat(32, 34),
    "q4_0": BlockFormat(32, 18),
    "q4_1": BlockFormat(32, 20),
}
"""The kinds the engine computes with. q8_0: f16 scale d, 32 signed bytes q: d·q. q4_0: d, 16 bytes of
nibbles: d·(q - 8). q4_1: d, f16 minimum m, nibbles: d·q + m. Low nibbles come first (values 0..15)."""


def row_bytes(kind: str, num_cols: int) -> int:
    """Bytes of one row of `num_cols` values; `num_cols` must be a whole number of blocks."""
    block = KINDS[kind]
    return num_cols // block.elements * block.num_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A weight. `shape` is (rows = outputs, cols = inputs) or (length,); `data` holds the raw blocks."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: U8

    @property
    def num_bytes(self) -> int:
        """Bytes as stored."""
        return int(self.data.nbytes)

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))


def dequantise(tensor: Tensor) -> F32:
    """The values as a new float32 array shaped `tensor.shape`. Raises KeyError on an unknown kind."""
    return _DECODERS[tensor.kind](tensor.data).reshape(tensor.shape)


def _f32(data: U8) -> F32:
    return data.view("<f4").astype(np.float32)


def _f16(data: U8) -> F32:
    return data.view("<f2").astype(np.float32)


def _bf16(data: U8) -> F32:
    # bfloat16 is the upper half of a float32.
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _half(blocks: U8, at: int) -> F32:
    """The f16 field at byte `at` of every block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: U8, at: int) -> F32:
    packed = blocks[:, at : at + 16]
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _q8_0(data: U8) -> F32:
    blocks = data.reshape(-1, 34)
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(data: U8) -> F32:
    blocks = data.reshape(-1, 18)
    return _half(blocks, 0) * (_nibbles(blocks, 2) - np.float32(8))


def _q4_1(data: U8) -> F32:
    blocks = data.reshape(-1, 20)
    return _half(blocks, 0) * _nibbles(blocks, 4) + _half(blocks, 2)


_DECODERS: dict[str, Callable[[U8], F32]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
}
