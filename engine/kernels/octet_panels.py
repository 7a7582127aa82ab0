"""A panel of 4-bit weights as products with signed bytes want it: as it is stored, or unpacked for many rows."""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.jit import cgutils, intrinsic, types
from engine.kernels.matmul import unpack_ir
from engine.kernels.outlier_lists import BYTES_BYTES, FACTOR_BYTES
from engine.kernels.packing import BLOCK_BYTES, FACTORED, SCALE_BYTES
from engine.kernels.simd import I16, I32_LANES, I64, LANES

Builder = Any
PACKED, UNPACKED = range(2)
"""Forms of a panel: as it is stored, its integers as bytes."""
ADDEND_AT, ADDENDS_AT = 64, 128
"""What scales a block lies behind the integers of all, FACTOR_BYTES a block: D, and here M, each in both halves of 32
bits; with the first of two blocks here both their M side by side."""
PACKED_ADDEND_AT = 32
"""Where the 16 M of a packed block's scales begin."""


def unpacked_bytes(num_inputs: int) -> int:
    """Room for a panel that is unpacked."""
    return -(-num_inputs // 64) * 2 * (BYTES_BYTES + FACTOR_BYTES)


def widened(builder: Builder, scales: Any) -> Any:
    """16 integers of 16 bits, each in the low half of 32 bits."""
    return builder.zext(simd.load(builder, scales, ir.VectorType(I16, LANES), 32), I32_LANES)


def _joined(builder: Builder, low: Any, high: Any) -> Any:
    """Two of those as pairs."""
    return builder.or_(low, builder.shl(high, ir.Constant(I32_LANES, [16] * LANES)))


def in_both_halves(builder: Builder, scales: Any) -> Any:
    """16 integers of 16 bits, each in both halves of 32 bits."""
    wide = widened(builder, scales)
    return _joined(builder, wide, wide)


def packed_lines(builder: Builder, panel: Any, scales: Any, block: Any) -> Iterator[Any]:
    """The integers of a block of a panel as it is stored, 8 lines of bytes, then D in both halves from its `scales`."""
    yield from unpack_ir(builder, FACTORED, simd.place(builder, panel, block, BLOCK_BYTES[FACTORED]))
    yield in_both_halves(builder, scales)


def load_line(builder: Builder, address: Any) -> Any:
    """One line of a panel."""
    return simd.load(builder, address, I32_LANES, 64)


def ready_lines(builder: Builder, integers: Any, factors: Any) -> Iterator[Any]:
    """The same of a block that was unpacked, each line loaded when it is asked for: registers are few."""
    for line in range(8):
        yield load_line(builder, simd.offset(builder, integers, 64 * line))
    yield load_line(builder, factors)


def after_integers(builder: Builder, unpacked: Any, num_blocks: Any) -> Any:
    """Where the factors of a panel lie that was unpacked there."""
    one = ir.Constant(I64, 1)
    return simd.place(builder, unpacked, builder.lshr(builder.add(num_blocks, one), one), 2 * BYTES_BYTES)


@intrinsic
def unpack(context: Any, panel: Any, num_blocks: Any, target: Any) -> Any:
    """A panel's integers as bytes, then its factors; what is left over of the last step of two blocks is zero."""

    def codegen(c: Any, b: Builder, _s: Any, args: Any) -> Any:
        panel_, blocks_, target_ = args
        scales, factors = (
            simd.place(b, panel_, blocks_, BLOCK_BYTES[FACTORED]),
            after_integers(b, target_, blocks_),
        )
        one = ir.Constant(I64, 1)
        with cgutils.for_range(b, blocks_) as loop:
            scales_at = simd.place(b, scales, loop.index, SCALE_BYTES[FACTORED])
            integers_to, factors_to = (
                simd.place(b, base, loop.index, num_bytes)
                for base, num_bytes in ((target_, BYTES_BYTES), (factors, FACTOR_BYTES))
            )
            for line, value in enumerate(packed_lines(b, panel_, scales_at, loop.index)):
                to = simd.offset(b, integers_to, 64 * line) if line < 8 else factors_to
                simd.store(b, value, to, 64)
            addend = in_both_halves(b, simd.offset(b, scales_at, PACKED_ADDEND_AT))
            simd.store(b, addend, simd.offset(b, factors_to, ADDEND_AT), 64)
        with b.if_then(b.trunc(blocks_, ir.IntType(1))):
            for base, num_bytes in ((target_, BYTES_BYTES), (factors, FACTOR_BYTES)):
                for at in range(0, num_bytes, 64):
                    to = simd.offset(b, simd.place(b, base, blocks_, num_bytes), at)
                    simd.store(b, ir.Constant(I32_LANES, [0] * LANES), to, 64)
        with cgutils.for_range(b, b.lshr(b.add(blocks_, one), one)) as loop:
            step = simd.place(b, factors, loop.index, 2 * FACTOR_BYTES)
            low, high = (
                load_line(b, simd.offset(b, step, FACTOR_BYTES * index + ADDEND_AT)) for index in range(2)
            )
            low = b.and_(low, ir.Constant(I32_LANES, [0xFFFF] * LANES))
            simd.store(b, _joined(b, low, high), simd.offset(b, step, ADDENDS_AT), 64)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen
