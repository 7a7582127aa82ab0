"""Attention over paged KV: near plain float64 attention, and the same bits on every path and in any tile."""

from typing import Any

import numpy as np
import pytest

from engine.config import KVLayout
from engine.kernels import amx, available, choose
from engine.kernels.attention import TILE_POSITIONS, attend, scratch_bytes
from engine.kernels.isa import Isa
from engine.kernels.jit import jit
from engine.kernels.kv import BLOCK_TOKENS, head_bytes, write_key, write_value
from engine.kernels.packing import aligned

KV_HEADS = 2


@jit
def _write(source: int, head_dim: int, slot: int, target: int, values: int) -> None:
    if values:
        write_value(source, head_dim, slot, target)
    else:
        write_key(source, head_dim, slot, target)


@jit
def _part_bytes(head_dim: int) -> Any:
    return head_bytes(head_dim)


class Case:
    """Random queries, keys and values of one sequence; blocks lie in any order in memory that held something else."""

    def __init__(self, num_tokens: int, head_dim: int, group: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.head_dim, self.group, self.num_tokens = head_dim, group, num_tokens
        self.queries = rng.standard_normal((num_tokens, group, head_dim)).astype(np.float32)
        self.keys = rng.standard_normal((num_tokens, head_dim)).astype(np.float32) * 2
        self.values = rng.standard_normal((num_tokens, head_dim)).astype(np.float32)
        # Amplitudes differ from token to token: scales are a token's own.
        self.values *= rng.uniform(0.1, 10, (num_tokens, 1)).astype(np.float32)
        layout = KVLayout(num_layers=1, num_kv_heads=KV_HEADS, head_dim=head_dim)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        self.block_bytes = layout.block_bytes
        self.cache = aligned(num_blocks * layout.block_bytes).reshape(num_blocks, -1)
        self.cache[:] = 0xFF
        self.table = rng.permutation(num_blocks).astype(np.int32)
        part = _part_bytes(head_dim)
        self.keys_at, self.values_at = part, (KV_HEADS + 1) * part  # the second head
        for token in range(num_tokens):
            block = self.cache[self.table[token // BLOCK_TOKENS]].ctypes.data
            slot = token % BLOCK_TOKENS
            for rows, at, is_value in ((self.keys, self.keys_at, 0), (self.values, self.values_at, 1)):
                _write(rows[token].ctypes.data, head_dim, slot, block + at, is_value)

    def run(self, isa: Isa, first: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Attention of `count` positions from `first` on."""
        out = np.zeros((count, self.group, self.head_dim), np.float32)
        scratch = np.full(scratch_bytes(self.group, self.head_dim), 0xAA, np.uint8)
        configs = np.ascontiguousarray(amx.tile_configs())
        row_bytes = self.group * self.head_dim * 4
        attend(
            isa, configs.ctypes.data, self.queries[first].ctypes.data, row_bytes, count, first, self.group,
            self.head_dim, self.table.ctypes.data, self.cache.ctypes.data, self.block_bytes, self.keys_at,
            self.values_at, out.ctypes.data, row_bytes, scratch.ctypes.data,
        )  # fmt: skip
        return out

    def in_tiles(self, isa: Isa, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Attention of all positions, `size` at a time."""
        starts = range(0, self.num_tokens, size)
        return np.concatenate([self.run(isa, at, min(size, self.num_tokens - at)) for at in starts])

    def plain(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Causal attention in float64, of queries rounded as they are multiplied: to 127 steps of a head's largest."""
        step = np.abs(self.queries).max(-1, keepdims=True).astype(np.float64) / 127
        rounded = np.rint(self.queries / step) * step
        scores = np.einsum("tgd,sd->tgs", rounded, self.keys.astype(np.float64))
        hidden = np.triu(np.ones((self.num_tokens, self.num_tokens), bool), 1)
        scores = np.where(hidden[:, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum(
            "tgs,sd->tgd", weights / weights.sum(-1, keepdims=True), self.values.astype(np.float64)
        )


@pytest.mark.parametrize(("num_tokens", "head_dim", "group"), [(200, 64, 3), (70, 128, 1), (97, 32, 4)])
def test_attention_is_near_plain_float64(num_tokens: int, head_dim: int, group: int) -> None:
    """Keys and values lose half a unit in 2,031 of their largest, weights half a unit in 255: about 1/500 of a result
    where one weight of a stretch stands out, as here, where scores have a deviation of 2 · sqrt(head_dim)."""
    case = Case(num_tokens, head_dim, group)
    found, wanted = case.in_tiles(choose(), TILE_POSITIONS), case.plain()
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 6e-3, error


@pytest.mark.parametrize(("num_tokens", "head_dim", "group"), [(150, 64, 3), (97, 32, 4), (40, 128, 7)])
def test_every_path_and_every_tile_gives_the_same_bits(num_tokens: int, head_dim: int, group: int) -> None:
    case = Case(num_tokens, head_dim, group)
    wanted = case.in_tiles(choose("portable"), 1)
    for path in available():
        for size in (1, 3, TILE_POSITIONS):
            assert case.in_tiles(choose(path), size).tobytes() == wanted.tobytes(), (path, size)


def test_zeros_are_no_trouble() -> None:
    """A query of zeros weighs all tokens alike; values of zeros add nothing."""
    case = Case(40, 64, 3)
    case.queries[:] = 0
    found = case.in_tiles(choose(), TILE_POSITIONS)
    means = np.cumsum(case.values, 0) / np.arange(1, 41)[:, None]
    assert np.allclose(found, means[:, None], atol=2e-3 * np.abs(case.values).max())

    case = Case(40, 64, 3)
    case.values[:] = 0
    block, part = case.cache, _part_bytes(64)
    for token in range(40):
        target = block[case.table[token // BLOCK_TOKENS]].ctypes.data + case.values_at
        _write(case.values[token].ctypes.data, 64, token % BLOCK_TOKENS, target, 1)
    assert part == 32 * (2 * 64 + 4)
    assert np.array_equal(case.in_tiles(choose(), TILE_POSITIONS), np.zeros((40, 3, 64), np.float32))


def test_the_layout_counts_what_kernels_use() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64)
    # 30 layers · K and V · 3 heads · 32 tokens · (64 integers of 2 bytes + a float) = 180 · 4,224 B
    assert layout.block_bytes == 180 * _part_bytes(64) == 760_320
