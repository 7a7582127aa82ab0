"""Weights in the one layout that serves one row (decode) and many (prefill).

A matrix [outputs, inputs] is cut into panels of 16 outputs. A panel holds, for each block of 32 inputs, its
integers in dot-product order ([8 groups of 4 inputs][16 outputs][4 inputs]); then, for each block, 16 half-float
scales d (and 16 minima m). Nibbles: group g in the low half of a byte, group g + 4 in the high half. All integers
are unsigned: value = d · (q - zero) [+ m].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.weights.tensor import KINDS, Tensor

U8 = NDArray[np.uint8]
LANES = 16
BLOCK = 32
ALIGNMENT = 64

Q4_1, Q4_0, Q8_0 = 0, 1, 2
FORMS = {"q4_1": Q4_1, "q4_0": Q4_0, "q8_0": Q8_0}
BLOCK_BYTES = (256, 256, 512)
"""Bytes of integers of one block of one panel, by form."""
SCALE_BYTES = (64, 32, 32)


def aligned(num_bytes: int) -> U8:
    """Zeroed bytes that start on a cache line."""
    raw = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes]


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """`data` is [num_panels, panel_bytes]; outputs beyond `num_outputs` are zero."""

    form: int
    num_outputs: int
    num_inputs: int
    panel_bytes: int
    data: U8

    @property
    def num_blocks(self) -> int:
        """Blocks of 32 inputs."""
        return self.num_inputs // BLOCK

    @property
    def num_panels(self) -> int:
        """Panels of 16 outputs."""
        return -(-self.num_outputs // LANES)


def packed_bytes(tensors: list[Tensor]) -> int:
    """What `pack` will allocate for these."""
    form, num_blocks = FORMS[tensors[0].kind], tensors[0].shape[1] // BLOCK
    num_panels = -(-sum(tensor.shape[0] for tensor in tensors) // LANES)
    return num_panels * _panel_bytes(form, num_blocks)


def _panel_bytes(form: int, num_blocks: int) -> int:
    used = num_blocks * (BLOCK_BYTES[form] + SCALE_BYTES[form])
    return -(-used // ALIGNMENT) * ALIGNMENT


class Arena:
    """One piece of memory that many matrices share: the system backs it with large pages where it can."""

    def __init__(self, num_bytes: int) -> None:
        self._free = aligned(num_bytes)

    def allocate(self, num_bytes: int) -> U8:
        """The next bytes, zero. Raises MemoryError beyond the end."""
        if num_bytes > len(self._free):
            raise MemoryError(f"arena: {num_bytes} bytes wanted, {len(self._free)} left")
        taken, self._free = self._free[:num_bytes], self._free[num_bytes:]
        return taken


def pack(tensors: list[Tensor], arena: Arena, *, interleave: bool = False) -> PackedMatrix:
    """Matrices of equal inputs as one, outputs one after another, or panel by panel in turn (`interleave`).

    Raises ValueError naming the tensor whose kind, number of inputs or, when joined, of outputs does not fit.
    """
    first = tensors[0]
    form = FORMS[first.kind]
    num_inputs = first.shape[1]
    for tensor in tensors:
        if tensor.kind != first.kind or tensor.shape[1] != num_inputs:
            raise ValueError(
                f"{tensor.name}: kind {tensor.kind} {tensor.shape} cannot join {first.name} {first.shape}"
            )
        if len(tensors) > 1 and tensor.shape[0] % LANES:
            raise ValueError(f"{tensor.name}: {tensor.shape[0]} outputs, not a multiple of {LANES}")
    num_outputs = sum(tensor.shape[0] for tensor in tensors)
    num_blocks = num_inputs // BLOCK
    used = num_blocks * (BLOCK_BYTES[form] + SCALE_BYTES[form])
    panel_bytes = _panel_bytes(form, num_blocks)
    num_panels = -(-num_outputs // LANES)
    data = arena.allocate(num_panels * panel_bytes).reshape(num_panels, panel_bytes)
    step = len(tensors) if interleave else 1
    at = 0
    for tensor in tensors:
        count = -(-tensor.shape[0] // LANES)
        # By pieces, so that the copies made on the way stay small beside the matrix.
        for start in range(0, count, 256):
            stop = min(start + 256, count)
            panels = slice(at + start * step, at + (stop - 1) * step + 1, step)
            data[panels, :used] = _panels(tensor, start * LANES, min(stop * LANES, tensor.shape[0]))
        at += 1 if interleave else count
    return PackedMatrix(form, num_outputs, num_inputs, panel_bytes, data)


def _panels(tensor: Tensor, first_row: int, last_row: int) -> U8:
    """Rows of a tensor as panels: [panels, integers and scales]."""
    form, num_blocks = FORMS[tensor.kind], tensor.shape[1] // BLOCK
    width = KINDS[tensor.kind].num_bytes
    raw = tensor.data.reshape(tensor.shape[0], num_blocks, width)[first_row:last_row]
    count = -(-len(raw) // LANES)
    if len(raw) % LANES:
        raw = np.concatenate([raw, np.zeros((count * LANES - len(raw), num_blocks, width), np.uint8)])
    raw = raw.reshape(count, LANES, num_blocks, width)
    scale_bytes = 4 if form == Q4_1 else 2
    # [panels, blocks, (d, m), lanes, 2 bytes]
    scales = raw[..., :scale_bytes].reshape(count, LANES, num_blocks, -1, 2).transpose(0, 2, 3, 1, 4)
    integers = raw[..., scale_bytes:]
    ordered: U8
    if form == Q8_0:
        # [panels, blocks, groups, lanes, 4]
        ordered = (integers ^ np.uint8(128)).reshape(count, LANES, num_blocks, 8, 4).transpose(0, 2, 3, 1, 4)
    else:
        # A shipped byte i holds inputs i and i + 16: groups g and g + 4, as wanted.
        ordered = integers.reshape(count, LANES, num_blocks, 4, 4).transpose(0, 2, 3, 1, 4)
    return np.concatenate([ordered.reshape(count, -1), scales.reshape(count, -1)], axis=1)
