"""AMX tiles: their configurations, loads and stores, and the products every user of tiles is made of."""

from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa
from engine.kernels.jit import intrinsic, overload, types
from engine.kernels.simd import I8, I64

Builder = Any
TILE_BYTES = 1024
CONFIG_BYTES = 2 * 64
FULL, HALF = 0, 1
"""Configurations: all tiles 16 rows of 64 bytes; rows of 32 inputs (4, 5) times weights of 8 rows (6, 7)."""


def tile_configs() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The 64-byte tile configurations FULL and HALF."""
    configs = np.zeros((2, 64), np.uint8)
    configs[:, 0] = 1
    for config, (columns, weight_rows) in zip(configs, ((64, 16), (32, 8)), strict=True):
        num_bytes, num_rows = config[16:48].view(np.uint16), config[48:56]
        num_bytes[:8], num_rows[:8] = (64,) * 4 + (columns,) * 2 + (64,) * 2, (16,) * 6 + (weight_rows,) * 2
    return configs


def _tile(index: int) -> Any:
    return ir.Constant(I8, index)


def _emit(builder: Builder, name: str, *args: Any) -> None:
    simd.call(builder, f"llvm.x86.{name}", ir.VoidType(), list(args))


def zero(builder: Builder, tile: int) -> None:
    """All zeros."""
    _emit(builder, "tilezero", _tile(tile))


def load(builder: Builder, tile: int, address: Any, stride: Any = 64) -> None:
    """Rows of a tile from memory, `stride` bytes apart."""
    step = ir.Constant(I64, stride) if isinstance(stride, int) else stride
    _emit(builder, "tileloadd64", _tile(tile), builder.inttoptr(address, simd.POINTER), step)


def store(builder: Builder, tile: int, address: Any) -> None:
    """Rows of a tile to memory, 64 bytes apart."""
    _emit(builder, "tilestored64", _tile(tile), builder.inttoptr(address, simd.POINTER), ir.Constant(I64, 64))


def dot(builder: Builder, signs: str, sums: int, rows: int, columns: int) -> None:
    """sums += rows · columns; `signs` of the two: "ss", "su", "us" (s: signed, u: unsigned)."""
    _emit(builder, f"tdpb{signs}d", *(_tile(tile) for tile in (sums, rows, columns)))


@intrinsic
def _configure(context: Any, address: Any) -> Any:
    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _emit(b, "ldtilecfg", b.inttoptr(args[0], simd.POINTER))
        return c.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def _release(context: Any) -> Any:
    def codegen(c: Any, b: Builder, _s: Any, _args: Any) -> Any:
        _emit(b, "tilerelease")
        return c.get_dummy_value()

    return types.none(), codegen


def begin(isa: Isa, config: int, configs: int) -> None:
    """Ready the tiles, on a path that has them."""
    raise NotImplementedError


def end(isa: Isa) -> None:
    """Give the tile registers up, so that a thread switch need not save them."""
    raise NotImplementedError


@overload(begin)
def _begin(isa: Any, config: Any, configs: Any) -> Any:
    def with_tiles(isa: Any, config: Any, configs: Any) -> None:
        _configure(configs + 64 * config)

    def without(isa: Any, config: Any, configs: Any) -> None:
        pass

    return with_tiles if isa.tag == "amx" else without


@overload(end)
def _end(isa: Any) -> Any:
    def with_tiles(isa: Any) -> None:
        _release()

    def without(isa: Any) -> None:
        pass

    return with_tiles if isa.tag == "amx" else without
