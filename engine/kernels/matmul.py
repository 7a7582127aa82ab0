"""Quantised matrix times quantised rows: sums exact in their integers, floats in one fixed order.

Activations x have 12 bits and one scale a row. Weights of 4 bits are s · (D · q + M) with integers D, M for each block
of 32 inputs and one float s an output: the sum over blocks of D · Σ q·x + M · Σ x is one exact integer of 32 bits,
however it is added up; then · s · scale of the row. So it is with 8 bits and one float an output. Those that have a
float d for each block: acc =
fma(float(Σ q·x), d, acc), then acc = fma(float(Σ x), -128·d, acc), block by block; at the end · scale of the row. An
activation x = 32·h + l is two signed bytes, |h| < 64, so Σ q·x = 32·Σ q·h + Σ q·l. Whoever computes an integer (tiles,
VNNI, plain code) gets the same one.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import avx2, simd
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, jit, types
from engine.kernels.packing import BLOCK_BYTES, CHANNEL, FACTORED, Q8_0, SCALE_BYTES
from engine.kernels.quantised import (
    LIMB_BYTES,
    LIMBS,
    ROW_STEP_BYTES,
    SUM_BYTES,
    SUM_FLOAT,
    SUM_WORD,
    TILE_SUMS_BYTES,
    block_of_rows,
    sums_place,
    tile_place,
)
from engine.kernels.simd import F32, F32_LANES, I8, I16, I32, I32_LANES, I64, LANES

Builder = Any
PREFETCH_BYTES = 8192
"""How far ahead of the block at work weights are fetched."""


def _const(value: int) -> Any:
    return ir.Constant(I32_LANES, [value] * LANES)


def fetch_ahead(builder: Builder, form: int, panel: Any, block: Any) -> None:
    """Fetch weights that come after a panel's block, those of the following panel where this one ends."""
    num_bytes = BLOCK_BYTES[form] + SCALE_BYTES[form]
    at = builder.add(panel, builder.mul(block, ir.Constant(I64, num_bytes)))
    for line in range(0, num_bytes, 64):
        simd.prefetch(builder, simd.offset(builder, at, PREFETCH_BYTES + line))


def _dot_portable(builder: Builder, acc: Any, unsigned: Any, signed: Any) -> Any:
    for byte in range(4):
        w = builder.and_(builder.lshr(unsigned, _const(8 * byte)), _const(255))
        x = builder.ashr(builder.shl(signed, _const(24 - 8 * byte)), _const(24))
        acc = builder.add(acc, builder.mul(w, x))
    return acc


def _dot_vnni(builder: Builder, acc: Any, unsigned: Any, signed: Any) -> Any:
    return simd.call(builder, "llvm.x86.avx512.vpdpbusd.512", I32_LANES, [acc, unsigned, signed])


def _dot_signed_arm(builder: Builder, acc: Any, left: Any, right: Any) -> Any:
    quads, bytes16 = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    parts = []
    for start in range(0, LANES, 4):
        order = ir.Constant(quads, list(range(start, start + 4)))
        part, a, b = (builder.shuffle_vector(value, value, order) for value in (acc, left, right))
        args = [part, builder.bitcast(a, bytes16), builder.bitcast(b, bytes16)]
        parts.append(simd.call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", quads, args))
    eight = ir.Constant(ir.VectorType(I32, 8), list(range(8)))
    low, high = builder.shuffle_vector(*parts[:2], eight), builder.shuffle_vector(*parts[2:], eight)
    return builder.shuffle_vector(low, high, ir.Constant(I32_LANES, list(range(LANES))))


def _dot_arm(builder: Builder, acc: Any, unsigned: Any, signed: Any) -> Any:
    # sdot is signed × signed: q = (q - 128) + 128, and the second term is the same dot product with ones.
    lowered = builder.xor(unsigned, _const(-0x7F7F7F80))
    sums = _dot_signed_arm(builder, _const(0), _const(0x01010101), signed)
    return builder.add(_dot_signed_arm(builder, acc, lowered, signed), builder.shl(sums, _const(7)))


def _pairs_portable(builder: Builder, acc: Any, a: Any, b: Any) -> Any:
    for shift in (16, 0):
        left, right = (builder.ashr(builder.shl(value, _const(shift)), _const(16)) for value in (a, b))
        acc = builder.add(acc, builder.mul(left, right))
    return acc


def _pairs_vnni(builder: Builder, acc: Any, a: Any, b: Any) -> Any:
    return simd.call(builder, "llvm.x86.avx512.vpdpwssd.512", I32_LANES, [acc, a, b])


def _pairs_avx2(builder: Builder, acc: Any, a: Any, b: Any) -> Any:
    return builder.add(acc, avx2.short_products(builder, a, b))


def _dot_avx2(builder: Builder, acc: Any, unsigned: Any, signed: Any) -> Any:
    pairs = avx2.byte_products(builder, unsigned, signed)
    return builder.add(acc, avx2.short_products(builder, pairs, _const(0x00010001)))


DOT: dict[str, Any] = {
    "amx": _dot_vnni,
    "vnni": _dot_vnni,
    "dotprod": _dot_arm,
    "portable": _dot_portable,
}
"""acc + in each lane the four unsigned bytes of one vector times the four signed bytes of the other."""
DOT_SHORT = DOT | {"avx2": _dot_avx2}
"""The same where the products of bytes 0 and 1, and those of bytes 2 and 3, add up to a 16-bit integer."""
DOT_SMALL = DOT | {"dotprod": _dot_signed_arm}
"""The same where the unsigned bytes are below 128."""


def _join_portable(builder: Builder, low: Any, high: Any) -> Any:
    return builder.or_(builder.and_(low, _const(0xFFFF)), builder.shl(high, _const(16)))


def _join_avx512(builder: Builder, low: Any, high: Any) -> Any:
    # (low & mask) | shifted by name: LLVM would make one permutation of it, which costs three times as much.
    args = [low, builder.shl(high, _const(16)), _const(0xFFFF), ir.Constant(I32, 0xEC)]
    return simd.call(builder, "llvm.x86.avx512.pternlog.d.512", I32_LANES, args)


JOIN = {"amx": _join_avx512, "vnni": _join_avx512}
"""The low halves of two vectors as one vector of pairs; elsewhere plain code."""
PAIRS = {"amx": _pairs_vnni, "vnni": _pairs_vnni, "avx2": _pairs_avx2}
"""acc + a.low · b.low + a.high · b.high of the two signed halves of each lane; elsewhere plain code."""


def unpack_ir(builder: Builder, form: int, address: Any) -> list[Any]:
    """The 8 groups of one block of a panel, unsigned bytes in lanes."""
    if form != FACTORED:
        return [simd.load(builder, simd.offset(builder, address, 64 * g), I32_LANES, 64) for g in range(8)]
    nibbles = _const(0x0F0F0F0F)
    packed = [simd.load(builder, simd.offset(builder, address, 64 * g), I32_LANES, 64) for g in range(4)]
    low = [builder.and_(value, nibbles) for value in packed]
    return low + [builder.and_(builder.lshr(value, _const(4)), nibbles) for value in packed]


def scales_ir(builder: Builder, form: int, address: Any) -> tuple[Any, Any]:
    """Factor and addend of one block of a panel.

    FACTORED: pairs of 16 bits, (32·D, D) for Σ q·h and Σ q·l, (16·M, M) for 2·Σ h and Σ l; CHANNEL: the same for all
    blocks; Q8_0: floats d and -128 · d.
    """
    if form == CHANNEL:
        # 1 and the -128 that unsigned bytes are off by, against 32 · Σ h + Σ l as (2 · Σ h, Σ l).
        minus = ir.Constant(ir.VectorType(I16, 2 * LANES), [-2048, -128] * LANES)
        return _const(1), builder.bitcast(minus, I32_LANES)
    if form == FACTORED:
        kind, pairs = ir.VectorType(I16, LANES), ir.VectorType(I16, 2 * LANES)
        twice = ir.Constant(ir.VectorType(I32, 2 * LANES), [lane // 2 for lane in range(2 * LANES)])
        values = (simd.load(builder, simd.offset(builder, address, at), kind, 32) for at in (0, 32))
        doubled = (
            builder.mul(builder.shuffle_vector(value, value, twice), ir.Constant(pairs, [high, 1] * LANES))
            for value, high in zip(values, (32, 16), strict=True)
        )
        factor, addend = (builder.bitcast(value, I32_LANES) for value in doubled)
        return factor, addend
    d = builder.fpext(simd.load(builder, address, ir.VectorType(simd.F16, LANES), 32), F32_LANES)
    return d, builder.fmul(d, ir.Constant(F32_LANES, [-128.0] * LANES))


def scale_and_store(
    builder: Builder, form: int, value: Any, row_scale: Any, scale: Any, out: Any, add: Any
) -> None:
    """One row's sums over all inputs, scaled, to 16 floats at `out` (added when `add`).

    `row_scale`: where the panel's 16 floats lie (none with Q8_0, whose sums are floats); `scale`: the row's.
    """
    if form != Q8_0:
        value = builder.fmul(builder.sitofp(value, F32_LANES), simd.load(builder, row_scale, F32_LANES, 64))
    value = builder.fmul(value, simd.splat(builder, simd.load(builder, scale, F32, 4), F32_LANES))
    with builder.if_else(builder.icmp_signed("!=", add, ir.Constant(I64, 0))) as (adds, stores):
        with adds:
            simd.store(builder, builder.fadd(simd.load(builder, out, F32_LANES), value), out)
        with stores:
            simd.store(builder, value, out)


@intrinsic
def _rows_by_panel(
    context: Any,
    isa: Any,
    form: Any,
    rows: Any,
    panel: Any,
    num_blocks: Any,
    x: Any,
    sums: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    add: Any,
) -> Any:
    """`rows` rows times one panel; see `multiply_panel`."""
    if not (isinstance(isa, IsaType) and isinstance(form, types.IntegerLiteral)):
        return None
    code, count = form.literal_value, rows.literal_value
    dot = (DOT_SMALL if code == FACTORED else DOT)[isa.tag]
    pairs, join = PAIRS.get(isa.tag, _pairs_portable), JOIN.get(isa.tag, _join_portable)

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, panel_, blocks_, x_, sums_, scales_, out_, out_stride_, add_ = args
        kind = F32_LANES if code == Q8_0 else I32_LANES
        accs = [cgutils.alloca_once_value(b, ir.Constant(kind, [0] * LANES)) for _ in range(count)]
        scale_base = b.add(panel_, b.mul(blocks_, ir.Constant(I64, BLOCK_BYTES[code])))
        with cgutils.for_range(b, blocks_) as loop:
            weights = unpack_ir(
                b, code, b.add(panel_, b.mul(loop.index, ir.Constant(I64, BLOCK_BYTES[code])))
            )
            factor, addend = scales_ir(
                b, code, b.add(scale_base, b.mul(loop.index, ir.Constant(I64, SCALE_BYTES[code])))
            )
            fetch_ahead(b, code, panel_, loop.index)
            rows_at = block_of_rows(b, LIMBS, x_, loop.index)
            sums_at = b.add(sums_, b.mul(loop.index, ir.Constant(I64, TILE_SUMS_BYTES)))
            for r in range(count):
                at = simd.offset(b, sums_at, SUM_BYTES * r)
                parts = []
                for limb in (0, LIMB_BYTES):
                    integer = _const(0)
                    for group, w in enumerate(weights):
                        quad = simd.load(
                            b, simd.offset(b, rows_at, ROW_STEP_BYTES * r + limb + 4 * group), I32, 4
                        )
                        integer = dot(b, integer, w, simd.splat(b, quad, I32_LANES))
                    parts.append(integer)
                if code == CHANNEL:
                    both = b.add(b.shl(parts[0], _const(5)), parts[1])
                    x_pair = simd.splat(b, simd.load(b, simd.offset(b, at, SUM_WORD), I32, 4), I32_LANES)
                    b.store(pairs(b, b.add(b.load(accs[r]), both), x_pair, addend), accs[r])
                elif code == FACTORED:
                    # Both sums fit 16 bits: 15 · 63 · 32 < 2^15.
                    both = join(b, *parts)
                    x_pair = simd.splat(b, simd.load(b, simd.offset(b, at, SUM_WORD), I32, 4), I32_LANES)
                    acc = pairs(b, b.load(accs[r]), both, factor)
                    b.store(pairs(b, acc, x_pair, addend), accs[r])
                else:
                    both = b.add(b.shl(parts[0], _const(5)), parts[1])
                    total = simd.splat(b, simd.load(b, simd.offset(b, at, SUM_FLOAT), F32, 4), F32_LANES)
                    acc = simd.fma_ir(b, b.sitofp(both, F32_LANES), factor, b.load(accs[r]))
                    b.store(simd.fma_ir(b, total, addend, acc), accs[r])
        row_scale = b.add(scale_base, b.mul(blocks_, ir.Constant(I64, SCALE_BYTES[code])))
        for r in range(count):
            target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
            scale_and_store(b, code, b.load(accs[r]), row_scale, simd.offset(b, scales_, 4 * r), target, add_)
        return c.get_dummy_value()

    return types.none(isa, form, rows, *[types.int64] * 8), codegen


@inline
def _panel_of_form(
    isa: Isa,
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
) -> None:
    row = first
    while row < last:
        # Groups of 4, 2 and 1 from a multiple of 16 on: a group never straddles two tiles of rows.
        a, s = x + tile_place(row, num_blocks), sums + sums_place(row, num_blocks)
        f, o = scales + row * 4, out + row * out_stride
        if row + 4 <= last:
            _rows_by_panel(isa, form, 4, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 4
        elif row + 3 <= last:
            _rows_by_panel(isa, form, 3, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 3
        elif row + 2 <= last:
            _rows_by_panel(isa, form, 2, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 2
        else:
            _rows_by_panel(isa, form, 1, panel, num_blocks, a, s, f, o, out_stride, add)
            row += 1


@jit
def multiply_panel(
    isa: Isa,
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
) -> None:
    """Rows first..last of quantised `x` times one panel into 16 floats a row at `out` (added when `add`).

    `first` is a multiple of 16.
    """
    if form == 0:
        _panel_of_form(isa, 0, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)
    elif form == 1:
        _panel_of_form(isa, 1, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)
    else:
        _panel_of_form(isa, 2, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)
