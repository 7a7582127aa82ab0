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
        self.write()

    def write(self) -> None:
        """All keys and values into the cache."""
        for token in range(self.num_tokens):
            block = self.cache[self.table[token // BLOCK_TOKENS]].ctypes.data
            slot = token % BLOCK_TOKENS
            for rows, at, is_value in ((self.keys, self.keys_at, 0), (self.values, self.values_at, 1)):
                _write(rows[token].ctypes.data, self.head_dim, slot, block + at, is_value)

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
        """Causal attention in float64, of numbers rounded as they are multiplied."""
        # Of a query two neighbours together have 127 steps.
        neighbours = np.abs(self.queries).reshape(*self.queries.shape[:-1], -1, 2).sum(-1)
        queries, keys, values = (
            _rounded(heads, np.abs(largest).max(-1, keepdims=True))
            for heads, largest in (
                (self.queries, neighbours),
                (self.keys, self.keys),
                (self.values, self.values),
            )
        )
        scores = np.einsum("tgd,sd->tgs", queries, keys)
        hidden = np.triu(np.ones((self.num_tokens, self.num_tokens), bool), 1)
        scores = np.where(hidden[:, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("tgs,sd->tgd", weights / weights.sum(-1, keepdims=True), values)


def _rounded(
    heads: np.ndarray[Any, np.dtype[np.float32]], top: np.ndarray[Any, np.dtype[np.float32]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    step = np.where(top > 0, top, 1).astype(np.float64) / 127
    rounded: np.ndarray[Any, np.dtype[np.float64]] = np.rint(heads / step) * step
    return rounded


@pytest.mark.parametrize(("num_tokens", "head_dim", "group"), [(200, 64, 3), (70, 128, 1), (97, 32, 4)])
def test_attention_is_near_plain_float64(num_tokens: int, head_dim: int, group: int) -> None:
    """Beside the rounding of queries, keys and values weights lose half a unit in 255: about 1/500 of a result where
    one weight of a stretch stands out, as here, where scores have a deviation of 2 · sqrt(head_dim)."""
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
    """A query of zeros weighs all tokens alike; values of zeros add nothing. Values lose half a unit in 127 of their
    largest, equal weights half a unit in 255 / 2: 1/254 + 1/255 < 8/1000."""
    case = Case(40, 64, 3)
    case.queries[:] = 0
    found = case.in_tiles(choose(), TILE_POSITIONS)
    means = np.cumsum(case.values, 0) / np.arange(1, 41)[:, None]
    assert np.allclose(found, means[:, None], atol=8e-3 * np.abs(case.values).max())

    case = Case(40, 64, 3)
    case.values[:] = 0
    case.write()
    assert np.array_equal(case.in_tiles(choose(), TILE_POSITIONS), np.zeros((40, 3, 64), np.float32))


def test_the_layout_counts_what_kernels_use() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64)
    # 30 layers · K and V · 3 heads · 32 tokens · (64 bytes + a float) = 180 · 2,176 B
    assert layout.block_bytes == 180 * _part_bytes(64) == 391_680


def test_the_largest_products_of_weights_fit() -> None:
    """All values at an end of their range and all tokens of equal weight: the products of neighbours add up to
    128 · 127 + 128 · 127, the most there is, below 2**15."""
    case = Case(64, 64, 3)
    for sign in (1, -1):
        case.queries[:], case.keys[:], case.values[:] = sign, 1, sign
        case.write()
        wanted = case.in_tiles(choose("portable"), TILE_POSITIONS)
        assert np.allclose(wanted, sign, atol=8e-3)
        for path in available():
            assert case.in_tiles(choose(path), TILE_POSITIONS).tobytes() == wanted.tobytes(), path


def test_the_largest_products_of_queries_fit() -> None:
    """Queries and keys at the ends of their ranges: 64 · 255 + 64 · 255, below 2**15. Every other token's keys are as
    large but of both signs, and scores are small, 64 · 0.02 against 0: what a larger product lost would show."""
    case = Case(64, 64, 3)
    for sign in (1, -1):
        case.queries[:], case.keys[:] = sign * 0.02, 1
        case.keys[::2, ::2] = -1
        case.write()
        wanted = case.in_tiles(choose("portable"), TILE_POSITIONS)
        assert np.linalg.norm(wanted - case.plain()) < 8e-3 * np.linalg.norm(wanted)
        for path in available():
            assert case.in_tiles(choose(path), TILE_POSITIONS).tobytes() == wanted.tobytes(), path
