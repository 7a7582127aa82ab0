"""Weights in the one layout that serves one row (decode) and many (prefill).

A matrix [outputs, inputs] is cut into panels of 16 outputs. A panel holds, for each block of 32 inputs, its
integers in dot-product order ([8 groups of 4 inputs][16 outputs][4 inputs]), all unsigned; then what scales them.

- Nibbles (FACTORED; group g in the low half of a byte, group g + 4 in the high half): for each block 16 integers D and
  16 integers M of 16 bits, then for the panel 16 floats s. value = s · (D · q + M), see `weights.quantise.factor`.
- Bytes (Q8_0): for each block 16 half-float scales d. value = d · (q - 128).
- Bytes (CHANNEL, what comes as floats): for the panel 16 floats s. value = s · (q - 128), see
  `weights.quantise.quantise_per_channel`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.weights.quantise import factor, quantise_per_channel
from engine.weights.tensor import KINDS, Tensor, dequantise

U8 = NDArray[np.uint8]
LANES = 16
BLOCK = 32
ALIGNMENT = 64

FACTORED, Q8_0, CHANNEL = 0, 1, 2
FORMS = {"q4_1": FACTORED, "q4_0": FACTORED, "q8_0": Q8_0, "f32": CHANNEL, "f16": CHANNEL, "bf16": CHANNEL}
BLOCK_BYTES = (256, 512, 512)
"""Bytes of integers of one block of one panel, by form."""
SCALE_BYTES = (64, 32, 0)
"""Bytes of scales of one block of one panel."""
ROW_SCALE_BYTES = (64, 0, 64)
"""Bytes of scales of a whole panel."""


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
    return -(-_used_bytes(form, num_blocks) // ALIGNMENT) * ALIGNMENT


def _used_bytes(form: int, num_blocks: int) -> int:
    return num_blocks * (BLOCK_BYTES[form] + SCALE_BYTES[form]) + ROW_SCALE_BYTES[form]


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
    used = _used_bytes(form, num_blocks)
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
    raw = tensor.data.reshape(tensor.shape[0], -1)[first_row:last_row]
    count = -(-len(raw) // LANES)
    if len(raw) % LANES:
        raw = np.concatenate([raw, np.zeros((count * LANES - len(raw), raw.shape[1]), np.uint8)])
    ordered: NDArray[Any]
    scales: list[NDArray[Any]]
    if form == CHANNEL:
        floats = dequantise(Tensor(tensor.name, tensor.kind, (len(raw), tensor.shape[1]), raw.reshape(-1)))
        quants, row_scales = quantise_per_channel(floats)
        ordered = (quants.view(np.uint8) ^ np.uint8(128)).reshape(count, LANES, num_blocks, 8, 4)
        return _joined(count, ordered.transpose(0, 2, 3, 1, 4), row_scales)
    raw = raw.reshape(count, LANES, num_blocks, KINDS[tensor.kind].num_bytes)
    scale_bytes = 4 if tensor.kind == "q4_1" else 2
    halves = np.ascontiguousarray(raw[..., :scale_bytes]).view(np.float16)
    integers = raw[..., scale_bytes:]
    if form == Q8_0:
        # [panels, blocks, groups, lanes, 4]
        ordered = (integers ^ np.uint8(128)).reshape(count, LANES, num_blocks, 8, 4).transpose(0, 2, 3, 1, 4)
        scales = [halves.reshape(count, LANES, num_blocks).transpose(0, 2, 1)]
    else:
        # A shipped byte i holds inputs i and i + 16: groups g and g + 4, as wanted.
        ordered = integers.reshape(count, LANES, num_blocks, 4, 4).transpose(0, 2, 3, 1, 4)
        d = halves[..., 0].reshape(-1, num_blocks)
        m = halves[..., 1].reshape(-1, num_blocks) if tensor.kind == "q4_1" else None
        steps, offsets, row_scales = factor(d, m)
        # [panels, blocks, (D, M), lanes]
        both = np.stack([steps, offsets]).reshape(2, count, LANES, num_blocks).transpose(1, 3, 0, 2)
        scales = [both, row_scales.reshape(count, LANES)]
    return _joined(count, ordered, *scales)


def _joined(num_panels: int, *parts: NDArray[Any]) -> U8:
    """Parts that each begin with the panels, as bytes one after another in every panel."""
    flat = [np.ascontiguousarray(part).reshape(num_panels, -1).view(np.uint8) for part in parts]
    return np.concatenate(flat, axis=1)
