"""Quantised matrix times quantised rows, exact in its integers and in one fixed order in its floats.

For a row and 16 outputs, over the blocks b of 32 inputs in order: acc = fma(float(Σ q·x), d, acc), then
acc = fma(float(Σ x), m, acc); at the end acc · scale of the row. An activation x = 16·h + l has 12 bits in two
signed bytes, so Σ q·x = 16·Σ q·h + Σ q·l. Whoever computes Σ q·x (tiles, VNNI, plain code) gets the same integer.
"""

from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, inline, intrinsic, jit, types
from engine.kernels.packing import BLOCK_BYTES, Q4_0, Q4_1, Q8_0, SCALE_BYTES
from engine.kernels.simd import F32, F32_LANES, I8, I32, I32_LANES, I64, LANES

Builder = Any
TILE_ROWS = 16
ROW_BLOCK_BYTES = 64
"""One block of one quantised row: 32 bytes h, 32 bytes l. 16 rows of one block lie together, then the next block."""
PREFETCH_BYTES = 8192
"""How far ahead of the block at work weights are fetched."""
TILE_BYTES = TILE_ROWS * ROW_BLOCK_BYTES
TILE_SUMS_BYTES = TILE_ROWS * 4
"""The sums of 16 rows over one block."""


def _const(value: int) -> Any:
    return ir.Constant(I32_LANES, [value] * LANES)


def fetch_ahead(builder: Builder, form: int, panel: Any, block: Any) -> None:
    """Fetch weights that come after a panel's block, those of the following panel where this one ends."""
    num_bytes = BLOCK_BYTES[form] + SCALE_BYTES[form]
    at = builder.add(panel, builder.mul(block, ir.Constant(I64, num_bytes)))
    for line in range(0, num_bytes, 64):
        simd.prefetch(builder, simd.offset(builder, at, PREFETCH_BYTES + line))


def _dot_portable(builder: Builder, acc: Any, weights: Any, quad: Any) -> Any:
    for byte in range(4):
        w = builder.and_(builder.lshr(weights, _const(8 * byte)), _const(255))
        x = builder.ashr(builder.shl(quad, ir.Constant(I32, 24 - 8 * byte)), ir.Constant(I32, 24))
        acc = builder.add(acc, builder.mul(w, simd.splat(builder, x, I32_LANES)))
    return acc


def _dot_vnni(builder: Builder, acc: Any, weights: Any, quad: Any) -> Any:
    x = simd.splat(builder, quad, I32_LANES)
    return simd.call(builder, "llvm.x86.avx512.vpdpbusd.512", I32_LANES, [acc, weights, x])


def _dot_avx2(builder: Builder, acc: Any, weights: Any, quad: Any) -> Any:
    # Bytes 0, 2 and 1, 3 of each lane as 16-bit pairs: every product and sum is exact.
    shorts = ir.VectorType(ir.IntType(16), 32)
    eight = ir.Constant(shorts, [8] * 32)
    w, x = builder.bitcast(weights, shorts), builder.bitcast(simd.splat(builder, quad, I32_LANES), shorts)
    pairs = (
        (builder.and_(w, ir.Constant(shorts, [255] * 32)), builder.ashr(builder.shl(x, eight), eight)),
        (builder.lshr(w, eight), builder.ashr(x, eight)),
    )
    for left, right in pairs:
        parts = []
        for start in (0, 16):
            order = ir.Constant(ir.VectorType(I32, 16), list(range(start, start + 16)))
            args = [builder.shuffle_vector(value, value, order) for value in (left, right)]
            parts.append(simd.call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), args))
        joined = builder.shuffle_vector(*parts, ir.Constant(I32_LANES, list(range(LANES))))
        acc = builder.add(acc, joined)
    return acc


def _dot_arm(builder: Builder, acc: Any, weights: Any, quad: Any) -> Any:
    # sdot is signed × signed: q = (q - 128) + 128, and the second term is the same dot product with ones.
    quads, bytes16 = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    x = builder.bitcast(simd.splat(builder, quad, quads), bytes16)
    ones = ir.Constant(bytes16, [1] * 16)
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    sums = simd.call(builder, name, quads, [ir.Constant(quads, [0] * 4), ones, x])
    offset = builder.shl(sums, ir.Constant(quads, [7] * 4))
    parts = []
    for start in range(0, LANES, 4):
        order = ir.Constant(quads, list(range(start, start + 4)))
        part = builder.shuffle_vector(acc, acc, order)
        w = builder.bitcast(builder.shuffle_vector(weights, weights, order), bytes16)
        signed = builder.xor(w, ir.Constant(bytes16, [-128] * 16))
        parts.append(builder.add(simd.call(builder, name, quads, [part, signed, x]), offset))
    eight = ir.Constant(ir.VectorType(I32, 8), list(range(8)))
    low, high = builder.shuffle_vector(*parts[:2], eight), builder.shuffle_vector(*parts[2:], eight)
    return builder.shuffle_vector(low, high, ir.Constant(I32_LANES, list(range(LANES))))


DOT = {
    "amx": _dot_vnni,
    "vnni": _dot_vnni,
    "avx2": _dot_avx2,
    "dotprod": _dot_arm,
    "portable": _dot_portable,
}


def unpack_ir(builder: Builder, form: int, address: Any) -> list[Any]:
    """The 8 groups of one block of a panel, unsigned bytes in lanes."""
    if form == Q8_0:
        return [simd.load(builder, simd.offset(builder, address, 64 * g), I32_LANES, 64) for g in range(8)]
    nibbles = _const(0x0F0F0F0F)
    packed = [simd.load(builder, simd.offset(builder, address, 64 * g), I32_LANES, 64) for g in range(4)]
    low = [builder.and_(value, nibbles) for value in packed]
    return low + [builder.and_(builder.lshr(value, _const(4)), nibbles) for value in packed]


def scales_ir(builder: Builder, form: int, address: Any) -> tuple[Any, Any]:
    """d and m of one block of a panel."""
    halves = ir.VectorType(simd.F16, LANES)
    d = builder.fpext(simd.load(builder, address, halves, 32), F32_LANES)
    if form == Q4_1:
        return d, builder.fpext(simd.load(builder, simd.offset(builder, address, 32), halves, 32), F32_LANES)
    zero = -8.0 if form == Q4_0 else -128.0
    return d, builder.fmul(d, ir.Constant(F32_LANES, [zero] * LANES))


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
    dot, code, count = DOT[isa.tag], form.literal_value, rows.literal_value

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        _, _, _, panel_, blocks_, x_, sums_, scales_, out_, out_stride_, add_ = args
        zero = ir.Constant(F32_LANES, [0.0] * LANES)
        accs = [cgutils.alloca_once_value(b, zero) for _ in range(count)]
        scale_base = b.add(panel_, b.mul(blocks_, ir.Constant(I64, BLOCK_BYTES[code])))
        with cgutils.for_range(b, blocks_) as loop:
            weights = unpack_ir(
                b, code, b.add(panel_, b.mul(loop.index, ir.Constant(I64, BLOCK_BYTES[code])))
            )
            d, m = scales_ir(
                b, code, b.add(scale_base, b.mul(loop.index, ir.Constant(I64, SCALE_BYTES[code])))
            )
            fetch_ahead(b, code, panel_, loop.index)
            rows_at = b.add(x_, b.mul(loop.index, ir.Constant(I64, TILE_BYTES)))
            sums_at = b.add(sums_, b.mul(loop.index, ir.Constant(I64, TILE_SUMS_BYTES)))
            for r in range(count):
                parts = []
                for limb in (0, 32):
                    integer = _const(0)
                    for group, w in enumerate(weights):
                        quad = simd.load(
                            b, simd.offset(b, rows_at, ROW_BLOCK_BYTES * r + limb + 4 * group), I32, 4
                        )
                        integer = dot(b, integer, w, quad)
                    parts.append(integer)
                both = b.add(b.shl(parts[0], _const(4)), parts[1])
                acc = simd.fma_ir(b, b.sitofp(both, F32_LANES), d, b.load(accs[r]))
                total = simd.splat(b, simd.load(b, simd.offset(b, sums_at, 4 * r), F32, 4), F32_LANES)
                b.store(simd.fma_ir(b, total, m, acc), accs[r])
        for r in range(count):
            scale = simd.load(b, simd.offset(b, scales_, 4 * r), F32, 4)
            value = b.fmul(b.load(accs[r]), simd.splat(b, scale, F32_LANES))
            target = b.add(out_, b.mul(out_stride_, ir.Constant(I64, r)))
            with b.if_else(b.icmp_signed("!=", add_, ir.Constant(I64, 0))) as (adds, stores):
                with adds:
                    simd.store(b, b.fadd(simd.load(b, target, F32_LANES), value), target)
                with stores:
                    simd.store(b, value, target)
        return c.get_dummy_value()

    return types.none(isa, form, rows, *[types.int64] * 8), codegen


@inline
def tile_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first block among quantised rows."""
    return row // TILE_ROWS * num_blocks * TILE_BYTES + row % TILE_ROWS * ROW_BLOCK_BYTES


@inline
def sums_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's first sum."""
    return row // TILE_ROWS * num_blocks * TILE_SUMS_BYTES + row % TILE_ROWS * 4


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
