"""Vectors of 64 bytes where registers hold half of one: AVX2."""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from engine.kernels import simd
from engine.kernels.simd import I8, I16, I32, I32_LANES, LANES

Builder = Any
PINNED_ROWS = 3
"""From so many rows on their sums fill the registers."""
INTS, SHORTS, BYTES = (ir.VectorType(kind, 256 // kind.width) for kind in (I32, I16, I8))
"""What a register holds."""


def halves(builder: Builder, kind: Any, *values: Any) -> Iterator[list[Any]]:
    """Both halves of vectors, each as a vector of type `kind`."""
    whole = ir.VectorType(kind.element, 2 * kind.count)
    for start in (0, kind.count):
        order = ir.Constant(ir.VectorType(I32, kind.count), list(range(start, start + kind.count)))
        yield [builder.shuffle_vector(*[builder.bitcast(value, whole)] * 2, order) for value in values]


def joined(builder: Builder, low: Any, high: Any) -> Any:
    """Two halves as a vector of 16 lanes."""
    order = ir.Constant(I32_LANES, list(range(LANES)))
    return builder.shuffle_vector(*(builder.bitcast(half, INTS) for half in (low, high)), order)


def pinned(builder: Builder, value: Any) -> Any:
    """A vector as a link of a chain of sums that is to be computed in this order.

    LLVM adds up a chain as a tree, so that it ends sooner: sums of several rows then want more registers than there
    are, and are stored and loaded again. What passes through assembler code, even none, it leaves where it is.
    """
    kept = []
    for (half,) in halves(builder, INTS, value):
        nothing = ir.InlineAsm(ir.FunctionType(INTS, [INTS]), "", "=x,0")
        kept.append(builder.call(nothing, [half]))
    return builder.bitcast(joined(builder, *kept), value.type)


def byte_products(builder: Builder, unsigned: Any, signed: Any) -> Any:
    """Products of 64 bytes each, two added to a lane of 16 bits."""
    return joined(
        builder,
        *(
            simd.call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, parts)
            for parts in halves(builder, BYTES, unsigned, signed)
        ),
    )


def short_products(builder: Builder, a: Any, b: Any) -> Any:
    """Products of 32 integers of 16 bits each, two added to a lane of 32 bits."""
    return joined(
        builder,
        *(
            simd.call(builder, "llvm.x86.avx2.pmadd.wd", INTS, parts)
            for parts in halves(builder, SHORTS, a, b)
        ),
    )
