"""The integer products of attention on AMX tiles: 16 rows times 16 tokens, or times 16 dims of the values."""

from typing import Any

from llvmlite import ir

from engine.kernels import amx, simd
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.kv import BLOCK_TOKENS, scales_at
from engine.kernels.simd import I64

Builder = Any
MIN_ROWS = 8
"""Fewer rows are quicker without tiles."""
SPILL_BYTES = 4 * amx.TILE_BYTES
"""Four tiles of products."""


@intrinsic
def _multiply(
    context: Any,
    signs: Any,
    rows: Any,
    row_bytes: Any,
    columns: Any,
    column_bytes: Any,
    steps: Any,
    spill: Any,
) -> Any:
    """16 rows times 16 columns over `steps` of 64; `signs` 0: rows signed, columns not; 1: the other way round."""
    order = ("su", "us")[signs.literal_value]

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, rows_, row_bytes_, columns_, column_bytes_, steps_, spill_ = args
        amx.zero(b, 0)
        with cgutils.for_range(b, steps_) as loop:
            along = b.mul(loop.index, ir.Constant(I64, 64))
            down = b.mul(loop.index, b.mul(column_bytes_, ir.Constant(I64, 16)))
            amx.load(b, 4, b.add(rows_, along), row_bytes_)
            amx.load(b, 6, b.add(columns_, down), column_bytes_)
            amx.dot(b, order, 0, 4, 6)
        amx.store(b, 0, spill_)
        return c.get_dummy_value()

    return types.none(signs, *[types.int64] * 6), codegen


def spare_bytes(head_dim: int) -> int:
    """Working memory for one thread."""
    return SPILL_BYTES + 2 * BLOCK_TOKENS * head_dim


@inline
def gather(first: int, second: int, head_dim: int, spare: int) -> None:
    """Both blocks' values under each other, for a tile spans the two."""
    block, values = scales_at(head_dim), spare + SPILL_BYTES
    for at in range(0, block, 64):
        simd.store_i32(values + at, simd.load_i32(first + at))
        simd.store_i32(values + block + at, simd.load_i32(second + at))


@inline
def score(
    begin: int, end: int, rows: int, head_dim: int, first: int, second: int, num_tokens: int, scores: int, spill: int,
) -> None:  # fmt: skip
    """See `attention_products.score`."""
    parts = (num_tokens + 15) // 16
    for part in range(parts):
        keys = (first if part < 2 else second) + part % 2 * (scales_at(head_dim) // 2)
        _multiply(0, rows, head_dim, keys, 64, head_dim // 64, spill + part * amx.TILE_BYTES)
    for part in range(parts):
        for row in range(begin, end):
            products = simd.load_i32(spill + part * amx.TILE_BYTES + row * 64)
            simd.store_i32(scores + row * 256 + part * 64, products)


@inline
def mix(
    begin: int, end: int, rows: int, head_dim: int, shrinks: int, units: int, mixed: int, spare: int
) -> None:
    """See `attention_products.mix`; after `gather`."""
    values = spare + SPILL_BYTES
    for first in range(0, head_dim, 64):
        for column in range(4):
            v = values + (first + column * 16) * 4
            _multiply(1, rows, 2 * BLOCK_TOKENS, v, head_dim * 4, 1, spare + column * amx.TILE_BYTES)
        for row in range(begin, end):
            shrink = simd.splat_f32(simd.read_f32(shrinks + row * 4))
            unit = simd.splat_f32(simd.read_f32(units + row * 4))
            for column in range(4):
                spot = mixed + (row * head_dim + first + column * 16) * 4
                products = simd.load_i32(spare + column * amx.TILE_BYTES + row * 64)
                simd.store_f32(spot, simd.fma(simd.as_f32(products), unit, simd.load_f32(spot) * shrink))
