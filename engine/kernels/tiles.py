"""Matrix products on AMX tiles: 16 rows × 16 outputs × one block of inputs at a time.

A nibble q goes into a tile twice, as 16·q beside the h limbs and as q beside the l limbs, so that one tile
product of 64 bytes gives Σ q·x of a block of 32 inputs; 8-bit weights take two products. The floats are those of
`matmul.py`, in its order.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa
from engine.kernels.jit import cgutils, intrinsic, jit, overload, types
from engine.kernels.matmul import (
    ROW_BLOCK_BYTES,
    TILE_BYTES,
    TILE_ROWS,
    TILE_SUMS_BYTES,
    fetch_ahead,
    multiply_panel,
    scales_ir,
    sums_place,
    tile_place,
    unpack_ir,
)
from engine.kernels.packing import BLOCK_BYTES, Q8_0, SCALE_BYTES
from engine.kernels.simd import F32, F32_LANES, I8, I32_LANES, I64, LANES

Builder = Any
MIN_ROWS = 13
"""Fewer rows than this are quicker without tiles: expanding a panel costs as much as a dozen rows without."""
MIN_REST = 5
"""Once a panel is expanded, tiles are quicker for so many rows left over."""
LAG = 2
"""A tile's integers are read so many blocks after they were stored: a tile store is not forwarded to a load, which
would wait until it has reached the cache."""
SPILLS = 4
"""Places for them in turn, a power of two above LAG."""
EXPANDED_BYTES = TILE_BYTES + 128
"""One block of a panel ready for the tiles: integers, then d and m as floats."""


def tile_configs() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two 64-byte tile configurations: nibbles (B of 16 rows), bytes (A of 32 columns, B of 8 rows).

    Tiles 0, 1: results; 2, 3: rows (A); 4: weights (B).
    """
    configs = np.zeros((2, 64), np.uint8)
    configs[:, 0] = 1
    for config, (columns, weight_rows) in zip(configs, ((64, 16), (32, 8)), strict=True):
        num_bytes, num_rows = config[16:48].view(np.uint16), config[48:56]
        num_bytes[:5], num_rows[:5] = (64, 64, columns, columns, 64), (16, 16, 16, 16, weight_rows)
    return configs


def _tile(index: int) -> Any:
    return ir.Constant(I8, index)


def _emit(builder: Builder, name: str, *args: Any) -> None:
    simd.call(builder, f"llvm.x86.{name}", ir.VoidType(), list(args))


@intrinsic
def configure(context: Any, address: Any) -> Any:
    """Load a tile configuration."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _emit(b, "ldtilecfg", b.inttoptr(args[0], simd.POINTER))
        return c.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def release(context: Any) -> Any:
    """Give the tile registers up, so that a thread switch need not save them."""

    def codegen(c: Any, b: Builder, _s: Any, _args: Any) -> Any:
        _emit(b, "tilerelease")
        return c.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _expand(context: Any, form: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A packed panel to `num_blocks` × EXPANDED_BYTES."""
    code = form.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, panel_, blocks_, target_ = args
        scale_base = b.add(panel_, b.mul(blocks_, ir.Constant(I64, BLOCK_BYTES[code])))
        four = ir.Constant(I32_LANES, [4] * LANES)
        with cgutils.for_range(b, blocks_) as loop:
            source = b.add(panel_, b.mul(loop.index, ir.Constant(I64, BLOCK_BYTES[code])))
            to = b.add(target_, b.mul(loop.index, ir.Constant(I64, EXPANDED_BYTES)))
            fetch_ahead(b, code, panel_, loop.index)
            for group, value in enumerate(unpack_ir(b, code, source)):
                if code == Q8_0:
                    simd.store(b, value, simd.offset(b, to, 64 * group), 64)
                else:
                    simd.store(b, b.shl(value, four), simd.offset(b, to, 64 * group), 64)
                    simd.store(b, value, simd.offset(b, to, 64 * (group + 8)), 64)
            scales = b.add(scale_base, b.mul(loop.index, ir.Constant(I64, SCALE_BYTES[code])))
            for index, value in enumerate(scales_ir(b, code, scales)):
                simd.store(b, value, simd.offset(b, to, TILE_BYTES + 64 * index), 64)
        return c.get_dummy_value()

    return types.none(form, *[types.int64] * 3), codegen


@intrinsic
def _tile_by_panel(
    context: Any,
    form: Any,
    count: Any,
    panel: Any,
    num_blocks: Any,
    x: Any,
    sums: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    scratch: Any,
) -> Any:
    """Up to 16 rows (`count` of them are stored) times one expanded panel."""
    code = form.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, count_, panel_, blocks_, x_, sums_, scales_, out_, out_stride_, add_, scratch_ = args
        x_stride = ir.Constant(I64, ROW_BLOCK_BYTES)
        zero = ir.Constant(F32_LANES, [0.0] * LANES)
        four = ir.Constant(I32_LANES, [4] * LANES)
        accs = [cgutils.alloca_once_value(b, zero) for _ in range(TILE_ROWS)]
        results = (0, 1) if code == Q8_0 else (0,)

        def at(base: Any, index: Any, num_bytes: int) -> Any:
            return b.add(base, b.mul(index, ir.Constant(I64, num_bytes)))

        def void(address: Any) -> Any:
            return b.inttoptr(address, simd.POINTER)

        def spill(block: Any, tile: int) -> Any:
            turn = b.and_(block, ir.Constant(I64, SPILLS - 1))
            return simd.offset(b, at(scratch_, turn, 2 * TILE_BYTES), TILE_BYTES * tile)

        with cgutils.for_range(b, b.add(blocks_, ir.Constant(I64, LAG))) as loop:
            with b.if_then(b.icmp_signed("<", loop.index, blocks_)):
                weights = at(panel_, loop.index, EXPANDED_BYTES)
                rows = at(x_, loop.index, TILE_BYTES)
                _emit(b, "tileloadd64", _tile(4), void(weights), ir.Constant(I64, 64))
                for tile in results:
                    _emit(b, "tilezero", _tile(tile))
                    _emit(b, "tileloadd64", _tile(2 + tile), void(simd.offset(b, rows, 32 * tile)), x_stride)
                    _emit(b, "tdpbsud", _tile(tile), _tile(2 + tile), _tile(4))
                    _emit(b, "tilestored64", _tile(tile), void(spill(loop.index, tile)), ir.Constant(I64, 64))
            with b.if_then(b.icmp_signed(">=", loop.index, ir.Constant(I64, LAG))):
                block = b.sub(loop.index, ir.Constant(I64, LAG))
                weights = at(panel_, block, EXPANDED_BYTES)
                d = simd.load(b, simd.offset(b, weights, TILE_BYTES), F32_LANES, 64)
                m = simd.load(b, simd.offset(b, weights, TILE_BYTES + 64), F32_LANES, 64)
                sums_at = at(sums_, block, TILE_SUMS_BYTES)
                for r in range(TILE_ROWS):
                    integer = simd.load(b, simd.offset(b, spill(block, 0), 64 * r), I32_LANES, 64)
                    if code == Q8_0:
                        low = simd.load(b, simd.offset(b, spill(block, 1), 64 * r), I32_LANES, 64)
                        integer = b.add(b.shl(integer, four), low)
                    acc = simd.fma_ir(b, b.sitofp(integer, F32_LANES), d, b.load(accs[r]))
                    total = simd.splat(b, simd.load(b, simd.offset(b, sums_at, 4 * r), F32, 4), F32_LANES)
                    b.store(simd.fma_ir(b, total, m, acc), accs[r])
        for r in range(TILE_ROWS):
            with b.if_then(b.icmp_signed("<", ir.Constant(I64, r), count_)):
                scale = simd.load(b, simd.offset(b, scales_, 4 * r), F32, 4)
                value = b.fmul(b.load(accs[r]), simd.splat(b, scale, F32_LANES))
                target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
                with b.if_else(b.icmp_signed("!=", add_, ir.Constant(I64, 0))) as (adds, stores):
                    with adds:
                        simd.store(b, b.fadd(simd.load(b, target, F32_LANES), value), target)
                    with stores:
                        simd.store(b, value, target)
        return c.get_dummy_value()

    return types.none(form, *[types.int64] * 10), codegen


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply_panel_by_tiles` for one thread."""
    return num_inputs // 32 * EXPANDED_BYTES + 2 * SPILLS * TILE_BYTES


@jit
def multiply_panel_by_tiles(
    form: int,
    first: int,
    last: int,
    panel: int,
    num_blocks: int,
    x: int,
    sums: int,
    scales: int,
    out: int,
    out_stride: int,
    add: int,
    scratch: int,
) -> None:
    """`matmul.multiply_panel` on tiles, which must be configured; the rows' buffers are padded to 16 rows."""
    expanded = scratch + 2 * SPILLS * TILE_BYTES
    if form == 0:
        _expand(0, panel, num_blocks, expanded)
    elif form == 1:
        _expand(1, panel, num_blocks, expanded)
    else:
        _expand(2, panel, num_blocks, expanded)
    for row in range(first, last, TILE_ROWS):
        count = min(TILE_ROWS, last - row)
        a, s = x + tile_place(row, num_blocks), sums + sums_place(row, num_blocks)
        f, o = scales + row * 4, out + row * out_stride
        if form == 2:
            _tile_by_panel(2, count, expanded, num_blocks, a, s, f, o, out_stride, add, scratch)
        else:
            _tile_by_panel(0, count, expanded, num_blocks, a, s, f, o, out_stride, add, scratch)


def begin(isa: Isa, form: int, configs: int) -> None:
    """Ready the tiles, on a path that has them, for products with weights of `form`."""
    raise NotImplementedError


def end(isa: Isa) -> None:
    """Undo `begin`."""
    raise NotImplementedError


def multiply(
    isa: Isa, form: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` the quickest way the path has. Between `begin` and `end`."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(begin)
def _begin(isa: Any, form: Any, configs: Any) -> Any:
    def with_tiles(isa: Any, form: Any, configs: Any) -> None:
        configure(configs + (64 if form == 2 else 0))

    def without(isa: Any, form: Any, configs: Any) -> None:
        pass

    return with_tiles if isa.tag == "amx" else without


@overload(end)
def _end(isa: Any) -> Any:
    def with_tiles(isa: Any) -> None:
        release()

    def without(isa: Any) -> None:
        pass

    return with_tiles if isa.tag == "amx" else without


@overload(multiply)
def _multiply(
    isa: Any,
    form: Any,
    first: Any,
    last: Any,
    panel: Any,
    num_blocks: Any,
    x: Any,
    sums: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    scratch: Any,
) -> Any:
    def plainly(
        isa: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        multiply_panel(isa, form, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    def by_tiles(
        isa: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        middle = first
        if last - first >= MIN_ROWS:
            rest = (last - first) % TILE_ROWS
            middle = last if rest >= MIN_REST else last - rest
        if middle > first:
            multiply_panel_by_tiles(
                form, first, middle, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
            )
        if last > middle:
            multiply_panel(isa, form, middle, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    return by_tiles if isa.tag == "amx" else plainly
