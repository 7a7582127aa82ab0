"""Rows of octets as they are written, see `quantised.py`: by AVX2 alone, for no other path has such rows."""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.avx2 import BYTES, INTS, SHORTS
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, types
from engine.kernels.quantised import (
    BY_OCTETS,
    OCTET_ROW_BYTES,
    OCTET_STEP_BYTES,
    OUTLIER_BITS,
    SUM_WORD,
    TILE_SUMS_BYTES,
)
from engine.kernels.simd import I32, I64
from engine.weights.quantise import MAX_OCTET

Builder = Any
_LONGS = ir.VectorType(I64, 4)
_IN_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Two packs by halves of 128 bits leave runs of four like this."""
_AS_PAIRS = [run + lane for run in (0, 8, 4, 12) for lane in (0, 2, 1, 3)]
"""One pack does, and of each four the pairs are wanted: 0 and 2, 1 and 3."""
_BIAS = 128


def _ordered(builder: Builder, value: Any, order: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(order)), order)
    return builder.shuffle_vector(value, value, mask)


def _to_bytes(builder: Builder, low: Any, high: Any) -> Any:
    """32 numbers of 16 bits, in order, each of which fits a byte."""
    packed = simd.call(builder, "llvm.x86.avx2.packsswb", BYTES, [low, high])
    return builder.bitcast(_ordered(builder, builder.bitcast(packed, INTS), _IN_ORDER), BYTES)


def _total(builder: Builder, octets: Any) -> Any:
    """Sum of 32 signed bytes."""
    lifted = builder.xor(octets, ir.Constant(BYTES, [_BIAS] * 32))
    sums = simd.call(builder, "llvm.x86.avx2.psad.bw", _LONGS, [lifted, ir.Constant(BYTES, [0] * 32)])
    return builder.sub(simd.tree_ir(builder, sums, builder.add), ir.Constant(I64, 32 * _BIAS))


@intrinsic
def _write_block(context: Any, isa: Any, first: Any, second: Any, at: Any, beyond: Any) -> Any:
    """2 · 16 integers as octets, an outlier as 0, at `at`; which are outliers, as bits, and above those the sum of the
    others in 16 bits. Outliers go to `beyond` in 16 bits, others as 0 there, unless it is 0."""
    if not isinstance(isa, IsaType):
        return None
    tag = isa.tag

    def codegen(_c: Any, b: Builder, _s: Any, args: Any) -> Any:
        a = args[1:]
        if tag not in BY_OCTETS:
            return ir.Constant(I64, 0)  # compiled, but never reached: see `layout_of`
        shorts, outliers, kept = [], [], []
        for value in a[:2]:
            low, high = (_ordered(b, value, list(range(start, start + 8))) for start in (0, 8))
            packed = simd.call(b, "llvm.x86.avx2.packssdw", SHORTS, [low, high])
            size = simd.call(b, "llvm.abs.v16i16", SHORTS, [packed, ir.Constant(ir.IntType(1), 0)])
            outside = b.icmp_signed(">", size, ir.Constant(SHORTS, [MAX_OCTET] * 16))
            shorts.append(packed)
            outliers.append(b.sext(outside, SHORTS))
            kept.append(b.and_(packed, b.not_(outliers[-1])))
        octets = _to_bytes(b, *kept)
        simd.store(b, octets, a[2])
        with cgutils.if_unlikely(b, b.icmp_signed("!=", a[3], ir.Constant(I64, 0))):
            for half, (value, outlier) in enumerate(zip(shorts, outliers, strict=True)):
                simd.store(b, _ordered(b, b.and_(value, outlier), _AS_PAIRS), simd.offset(b, a[3], 32 * half))
        bits = simd.call(b, "llvm.x86.avx2.pmovmskb", I32, [_to_bytes(b, *outliers)])
        total = b.and_(_total(b, octets), ir.Constant(I64, 0xFFFF))
        return b.or_(b.zext(bits, I64), b.shl(total, ir.Constant(I64, 32)))

    return types.int64(isa, simd.i32x16, simd.i32x16, types.int64, types.int64), codegen


@inline
def _write_floats(isa: Isa, source: int, factor: Any, is_finite: bool, at: int, beyond: int) -> Any:
    first, second = simd.splat_i32(0), simd.splat_i32(0)
    if is_finite:
        first = simd.nearest(simd.load_f32(source) * factor)
        second = simd.nearest(simd.load_f32(source + 64) * factor)
    return _write_block(isa, first, second, at, beyond)


@inline
def write_octets(
    isa: Isa,
    source: int,
    factor: Any,
    is_finite: bool,
    num_blocks: int,
    row: int,
    sums: int,
    beyond: int,
    ahead: int,
) -> None:
    """Blocks of a row: floats at `source` times `factor` (0 unless `is_finite`) to octets from `row` on, their sums and
    which are outliers from `sums` on, and what those are from `beyond` on, unless it is 0.

    Meanwhile the floats at `ahead` are fetched, and what will be the next row of the tile.
    """
    factors, total = simd.splat_f32(factor), 0
    for block in range(num_blocks):
        simd.fetch(ahead + block * 128)
        simd.fetch(ahead + block * 128 + 64)
        at = row + block // 2 * OCTET_STEP_BYTES
        here = sums + block * TILE_SUMS_BYTES
        pairs = beyond + block * 64 if beyond else 0
        if block % 2 == 0:
            simd.fetch(at + OCTET_ROW_BYTES)
            found = _write_floats(isa, source + block * 128, factors, is_finite, at, pairs)
            total = found >> 32
            simd.write_i32(here + SUM_WORD, total)
        else:
            found = _write_floats(isa, source + block * 128, factors, is_finite, at + 32, pairs)
            simd.write_i32(here - TILE_SUMS_BYTES + SUM_WORD, total | found >> 32 << 16)
        simd.write_i32(here + OUTLIER_BITS, found)
