"""Block formats that are converted to q8_0 at load: Q5_0, Q5_1 and the K-quants Q2_K to Q6_K.

Layouts are those of the GGUF format (ggml's `block_q*`). Each decoder takes whole blocks as
uint8[n, block bytes] and returns float32[n, values per block].
"""

from collections.abc import Callable

import numpy as np

from engine.weights.quantise import quantise_q8_0
from engine.weights.tensor import F32, U8

_CHUNK_BLOCKS = 65536
"""Blocks decoded at a time, so that a large tensor never exists in float32 as a whole."""


def to_q8_0(kind: str, data: U8) -> U8:
    """Raw blocks of `kind` re-quantised to raw q8_0 blocks. Raises KeyError unless `kind` is in DECODERS."""
    block_bytes, decode = DECODERS[kind]
    blocks = data.reshape(-1, block_bytes)
    parts = [
        quantise_q8_0(decode(blocks[begin : begin + _CHUNK_BLOCKS]))
        for begin in range(0, len(blocks), _CHUNK_BLOCKS)
    ]
    return np.concatenate(parts)


def _half(blocks: U8, at: int) -> F32:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fifth_bits(blocks: U8, at: int) -> U8:
    """Bits 0..31 of the little-endian word at `at`, worth 16 each: uint8[n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _nibbles(packed: U8) -> U8:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q5_0(blocks: U8) -> F32:
    values = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.float32)
    return _half(blocks, 0) * (values - np.float32(16))


def _q5_1(blocks: U8) -> F32:
    values = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).astype(np.float32)
    return _half(blocks, 0) * values + _half(blocks, 2)


def _crumbs(packed: U8) -> U8:
    """Two-bit fields of uint8[n, 64] in value order: uint8[n, 2 halves, 4 shifts, 32]."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    return (packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)


def _q2_k(blocks: U8) -> F32:
    n = len(blocks)
    values = _crumbs(blocks[:, 16:80]).reshape(n, 16, 16).astype(np.float32)
    scales = (blocks[:, :16] & 15).astype(np.float32) * _half(blocks, 80)
    minima = (blocks[:, :16] >> 4).astype(np.float32) * _half(blocks, 82)
    return (scales[:, :, None] * values - minima[:, :, None]).reshape(n, 256)


def _q3_k(blocks: U8) -> F32:
    n = len(blocks)
    low = _crumbs(blocks[:, 32:96]).astype(np.int8).reshape(n, 8, 32)
    # Bit i of a mask byte belongs to the i-th run of 32 values; a clear bit means "minus 4".
    high = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    values = (low - np.int8(4) * (1 - high.astype(np.int8))).astype(np.float32).reshape(n, 16, 16)
    packed = blocks[:, 96:108]
    lower = _nibbles(packed[:, :8])
    upper = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (lower | (upper << 4)).astype(np.float32) - np.float32(32)
    return (scales[:, :, None] * _half(blocks, 108)[:, :, None] * values).reshape(n, 256)


def _six_bit_pairs(packed: U8) -> tuple[F32, F32]:
    """Eight scales and eight minima of 6 bits each out of uint8[n, 12]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _scaled(blocks: U8, values: U8) -> F32:
    """d·scale·value - dmin·minimum for Q4_K and Q5_K; `values` is uint8[n, 8, 32]."""
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    scales *= _half(blocks, 0)
    minima *= _half(blocks, 2)
    return (scales[:, :, None] * values.astype(np.float32) - minima[:, :, None]).reshape(len(blocks), 256)


def _nibble_runs(packed: U8) -> U8:
    """uint8[n, 128]: each 32 bytes hold two runs of 32 values, low nibbles first: uint8[n, 8, 32]."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: U8) -> F32:
    return _scaled(blocks, _nibble_runs(blocks[:, 16:]))


def _q5_k(blocks: U8) -> F32:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & np.uint8(1)
    return _scaled(blocks, _nibble_runs(blocks[:, 48:]) | (high << np.uint8(4)))


def _q6_k(blocks: U8) -> F32:
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64)
    lower = np.concatenate([low & 15, low >> 4], axis=2).reshape(n, 2, 4, 32)
    values = (lower | (_crumbs(blocks[:, 128:192]) << 4)).astype(np.float32) - np.float32(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _half(blocks, 208)
    scaled: F32 = scales[:, :, None] * values.reshape(n, 16, 16)
    return scaled.reshape(n, 256)


DECODERS: dict[str, tuple[int, Callable[[U8], F32]]] = {
    "q5_0": (22, _q5_0),
    "q5_1": (24, _q5_1),
    "q2_k": (84, _q2_k),
    "q3_k": (110, _q3_k),
    "q4_k": (144, _q4_k),
    "q5_k": (176, _q5_k),
    "q6_k": (210, _q6_k),
}
"""Kind: bytes per block, decoder."""
