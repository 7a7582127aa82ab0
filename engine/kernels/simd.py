"""Vectors of 16 lanes inside Numba functions, and the few operations the kernels are written in.

A vector is an LLVM vector value. LLVM splits it into what the machine has (one AVX-512 register, two AVX2, four
NEON), so float code is written once and its results are the same bits everywhere: every operation here is
IEEE-exact, fused where it says `fma`, and sums across lanes follow one fixed tree. Memory is addressed by
integers (bytes); the caller vouches for them.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir

from engine.kernels.jit import cgutils, extending, intrinsic, templates, types

LANES = 16
F32 = ir.FloatType()
F16 = ir.HalfType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
POINTER = I8.as_pointer()
F32_LANES = ir.VectorType(F32, LANES)
F16_LANES = ir.VectorType(F16, LANES)
I32_LANES = ir.VectorType(I32, LANES)
I8_LANES = ir.VectorType(I8, 4 * LANES)


class VectorType(types.Type):  # type: ignore[misc]  # numba's classes are untyped
    """Numba's view of a vector value."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=name)


f32x16 = VectorType("f32x16", F32_LANES)
i32x16 = VectorType("i32x16", I32_LANES)


@extending.register_model(VectorType)
class _VectorModel(extending.models.PrimitiveModel):  # type: ignore[misc]  # numba's classes are untyped
    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


Builder = Any


def call(builder: Builder, name: str, result: ir.Type, args: list[Any]) -> Any:
    """Call the LLVM intrinsic or C function `name`."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def pointer(builder: Builder, address: Any, to: ir.Type) -> Any:
    """An address as a pointer to `to`."""
    return builder.inttoptr(address, to.as_pointer())


def load(builder: Builder, address: Any, kind: ir.Type, align: int = 1) -> Any:
    """Load a value of `kind` from an address."""
    return builder.load(pointer(builder, address, kind), align=align)


def store(builder: Builder, value: Any, address: Any, align: int = 1) -> None:
    """Store a value to an address."""
    builder.store(value, pointer(builder, address, value.type), align=align)


def offset(builder: Builder, address: Any, num_bytes: int) -> Any:
    """An address plus a constant."""
    return builder.add(address, ir.Constant(I64, num_bytes)) if num_bytes else address


def place(builder: Builder, base: Any, index: Any, num_bytes: int) -> Any:
    """base + index · num_bytes."""
    return builder.add(base, builder.mul(index, ir.Constant(I64, num_bytes)))


def prefetch(builder: Builder, address: Any, *, cache: int = 2) -> None:
    """Ask for the line at an address, which may be anywhere, into the first or second cache: nothing fails, nothing
    waits."""
    read, keep, data = (ir.Constant(I32, value) for value in (0, 4 - cache, 1))
    args = [builder.inttoptr(address, POINTER), read, keep, data]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), args)


def align_frame(builder: Builder) -> None:
    """Have the function's frame begin on a cache line, and with it what registers have no room for.

    LLVM aligns a frame when something in it asks for that before registers are given out. Otherwise vectors that are
    spilled lie across cache lines in some processes and not in others, by where their stack happens to begin.
    """
    place = cgutils.alloca_once(builder, I32_LANES)
    place.align = 64
    # Something that uses it and costs nothing, or there is no such thing.
    prefetch(builder, builder.ptrtoint(place, I64))


def splat(builder: Builder, scalar: Any, kind: ir.VectorType) -> Any:
    """A scalar in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    mask = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, one, mask)


def splat_word(builder: Builder, address: Any) -> Any:
    """The 32 bits at an address in every lane."""
    return splat(builder, load(builder, address, I32, 4), I32_LANES)


def fma_ir(builder: Builder, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return call(builder, "llvm.fma.v16f32", F32_LANES, [a, b, c])


LOG2_E = np.float32(1.4426950408889634)


def exp2_ir(builder: Builder, x: Any) -> Any:
    """2^x for x ≤ 126 to 3 parts in a million, 1 at 0, the same bits everywhere; held at 2^-126 below -126."""
    lowest, magic, *series, one = (ir.Constant(F32_LANES, [value] * LANES) for value in _EXP2)
    clamped = larger_ir(builder, x, lowest)
    shifted = builder.fadd(clamped, magic)
    rest = builder.fsub(clamped, builder.fsub(shifted, magic))
    value = series[0]
    for term in (*series[1:], one):
        value = fma_ir(builder, value, rest, term)
    # The whole part lies in the low bits of `shifted`: added to the exponent.
    whole = builder.shl(builder.bitcast(shifted, I32_LANES), ir.Constant(I32_LANES, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(value, I32_LANES), whole), F32_LANES)


MAGIC = 12582912.0
"""1.5 · 2^23: a float of that size has no room for a fraction, and its lowest bits hold the nearest integer."""
_EXP2 = (
    -126.0,
    MAGIC,
    # Minimax coefficients of 2^r - 1 on |r| ≤ 1/2 by relative error (found by weighted least squares)
    0.009582853220664227,
    0.05590642620810234,
    0.2402409861776472,
    0.6931241932253028,
    1.0,
)


def tree_ir(builder: Builder, value: Any, combine: Any) -> Any:
    """Fold all lanes to one: halves onto halves."""
    width = value.type.count
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(
                value, value, ir.Constant(ir.VectorType(I32, width), list(range(start, start + width)))
            )
            for start in (0, width)
        )
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


def larger_ir(builder: Builder, a: Any, b: Any) -> Any:
    """The larger of each pair of lanes; b where a is not a number."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def load_f32(context: Any, address: Any) -> Any:
    """16 floats at an address."""
    return f32x16(types.int64), lambda _c, b, _s, a: load(b, a[0], F32_LANES)


@intrinsic
def store_f32(context: Any, address: Any, value: Any) -> Any:
    """Store 16 floats."""

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        store(b, a[1], a[0])
        return c.get_dummy_value()

    return types.none(types.int64, f32x16), codegen


@intrinsic
def load_i32(context: Any, address: Any) -> Any:
    """16 integers of 32 bits at an address."""
    return i32x16(types.int64), lambda _c, b, _s, a: load(b, a[0], I32_LANES)


@intrinsic
def store_i32(context: Any, address: Any, value: Any) -> Any:
    """Store 16 integers of 32 bits."""

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        store(b, a[1], a[0])
        return c.get_dummy_value()

    return types.none(types.int64, i32x16), codegen


@intrinsic
def as_f32(context: Any, x: Any) -> Any:
    """Integers rounded to floats."""
    return f32x16(i32x16), lambda _c, b, _s, a: b.sitofp(a[0], F32_LANES)


@intrinsic
def store_i8(context: Any, address: Any, value: Any) -> Any:
    """The low byte of each lane."""

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        store(b, b.trunc(a[1], ir.VectorType(I8, LANES)), a[0])
        return c.get_dummy_value()

    return types.none(types.int64, i32x16), codegen


@intrinsic
def scatter_i8(context: Any, address: Any, value: Any, run: Any, stride: Any) -> Any:
    """The low byte of each lane in runs of `run` (1 or 4) bytes, `stride` bytes apart."""
    width = run.literal_value
    kind = ir.VectorType(ir.IntType(8 * width), LANES // width)

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        runs = b.bitcast(b.trunc(a[1], ir.VectorType(I8, LANES)), kind)
        for index in range(kind.count):
            target = b.add(a[0], b.mul(a[3], ir.Constant(I64, index)))
            store(b, b.extract_element(runs, ir.Constant(I32, index)), target)
        return c.get_dummy_value()

    return types.none(types.int64, i32x16, run, types.int64), codegen


@intrinsic
def splat_f32(context: Any, value: Any) -> Any:
    """A float in every lane."""
    return f32x16(types.float32), lambda _c, b, _s, a: splat(b, a[0], F32_LANES)


@intrinsic
def splat_i32(context: Any, value: Any) -> Any:
    """An integer in every lane."""
    return i32x16(types.int64), lambda _c, b, _s, a: splat(b, b.trunc(a[0], I32), I32_LANES)


@intrinsic
def fma(context: Any, x: Any, y: Any, z: Any) -> Any:
    """x · y + z, rounded once."""
    return f32x16(f32x16, f32x16, f32x16), lambda _c, b, _s, a: fma_ir(b, *a)


@intrinsic
def exp2(context: Any, x: Any) -> Any:
    """2^x for x ≤ 126, see `exp2_ir`."""
    return f32x16(f32x16), lambda _c, b, _s, a: exp2_ir(b, a[0])


@intrinsic
def absolute(context: Any, x: Any) -> Any:
    """|x|."""
    return f32x16(f32x16), lambda _c, b, _s, a: call(b, "llvm.fabs.v16f32", F32_LANES, list(a))


@intrinsic
def larger(context: Any, x: Any, y: Any) -> Any:
    """The larger of each pair of lanes; y where x is not a number."""
    return f32x16(f32x16, f32x16), lambda _c, b, _s, a: larger_ir(b, *a)


@intrinsic
def total(context: Any, x: Any) -> Any:
    """Sum of the lanes in a fixed tree."""
    return types.float32(f32x16), lambda _c, b, _s, a: tree_ir(b, a[0], b.fadd)


@intrinsic
def largest(context: Any, x: Any) -> Any:
    """Largest lane."""
    return types.float32(f32x16), lambda _c, b, _s, a: tree_ir(b, a[0], lambda x, y: larger_ir(b, x, y))


@intrinsic
def total_i32(context: Any, x: Any) -> Any:
    """Sum of the lanes."""
    return types.int64(i32x16), lambda _c, b, _s, a: b.sext(tree_ir(b, a[0], b.add), I64)


@intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """Which bit is the lowest that is set; one is."""
    flag = ir.Constant(ir.IntType(1), 1)
    return types.int64(types.int64), lambda _c, b, _s, a: call(b, "llvm.cttz.i64", I64, [a[0], flag])


def _nearest_ir(builder: Builder, x: Any, magic: Any, integers: Any) -> Any:
    shifted = builder.bitcast(builder.fadd(x, magic), integers)
    return builder.sub(shifted, builder.bitcast(magic, integers))


@intrinsic
def nearest(context: Any, x: Any) -> Any:
    """Nearest integer, ties to even; |x| < 2^22."""
    magic = ir.Constant(F32_LANES, [MAGIC] * LANES)
    return i32x16(f32x16), lambda _c, b, _s, a: _nearest_ir(b, a[0], magic, I32_LANES)


@intrinsic
def nearest_one(context: Any, x: Any) -> Any:
    """`nearest` of one float."""
    magic = ir.Constant(F32, MAGIC)
    return types.int64(types.float32), lambda _c, b, _s, a: b.sext(_nearest_ir(b, a[0], magic, I32), I64)


@intrinsic
def shift_right(context: Any, x: Any, bits: Any) -> Any:
    """Arithmetic shift."""

    def codegen(_c: Any, b: Builder, _s: Any, a: Any) -> Any:
        return b.ashr(a[0], splat(b, b.trunc(a[1], I32), I32_LANES))

    return i32x16(i32x16, types.int64), codegen


@intrinsic
def swap_pairs(context: Any, x: Any) -> Any:
    """Lanes 1, 0, 3, 2, …"""
    order = ir.Constant(I32_LANES, [lane ^ 1 for lane in range(LANES)])
    return f32x16(f32x16), lambda _c, b, _s, a: b.shuffle_vector(a[0], a[0], order)


@intrinsic
def butterfly(context: Any, x: Any, distance: Any) -> Any:
    """Of two lanes that lie `distance`, a power of two, apart: the sum in the lower, the difference in the other."""
    apart = distance.literal_value
    order = ir.Constant(I32_LANES, [lane ^ apart for lane in range(LANES)])
    signs = ir.Constant(F32_LANES, [-1.0 if lane & apart else 1.0 for lane in range(LANES)])

    def codegen(_c: Any, b: Builder, _s: Any, a: Any) -> Any:
        return fma_ir(b, a[0], signs, b.shuffle_vector(a[0], a[0], order))

    return f32x16(f32x16, distance), codegen


@intrinsic
def fetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at an address, see `prefetch`."""

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        prefetch(b, a[0])
        return c.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def read_f32(context: Any, address: Any) -> Any:
    """One float at an address."""
    return types.float32(types.int64), lambda _c, b, _s, a: load(b, a[0], F32)


@intrinsic
def write_f32(context: Any, address: Any, value: Any) -> Any:
    """Store one float."""

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        store(b, a[1], a[0])
        return c.get_dummy_value()

    return types.none(types.int64, types.float32), codegen


def _operator(python: Any, kind: VectorType, emit: str) -> None:
    class _Typing(templates.AbstractTemplate):  # type: ignore[misc]  # numba's classes are untyped
        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            return templates.signature(kind, kind, kind) if tuple(args) == (kind, kind) else None

    templates.infer_global(python)(_Typing)
    extending.lower_builtin(python, kind, kind)(lambda _c, b, _s, a: getattr(b, emit)(*a))


for _python, _float, _int in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
):
    _operator(_python, f32x16, _float)
    _operator(_python, i32x16, _int)


@intrinsic
def quotient(context: Any, x: Any, y: Any) -> Any:
    """x / y."""
    return f32x16(f32x16, f32x16), lambda _c, b, _s, a: b.fdiv(*a)


@intrinsic
def where_positive(context: Any, x: Any, y: Any) -> Any:
    """y where x is above 0, else 0."""

    def codegen(_c: Any, b: Builder, _s: Any, a: Any) -> Any:
        nothing = ir.Constant(F32_LANES, [0.0] * LANES)
        return b.select(b.fcmp_ordered(">", a[0], nothing), a[1], nothing)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def keep_until(context: Any, x: Any, last: Any, masked: Any) -> Any:
    """Lanes 0..last of x, `masked` in the others."""

    def codegen(_c: Any, b: Builder, _s: Any, a: Any) -> Any:
        lanes = ir.Constant(I32_LANES, list(range(LANES)))
        keep = b.icmp_signed("<=", lanes, splat(b, b.trunc(a[1], I32), I32_LANES))
        return b.select(keep, a[0], splat(b, a[2], F32_LANES))

    return f32x16(f32x16, types.int64, types.float32), codegen


@intrinsic
def read_i32(context: Any, address: Any) -> Any:
    """One 32-bit integer at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.sext(load(b, a[0], I32), I64)


@intrinsic
def write_i32(context: Any, address: Any, value: Any) -> Any:
    """Store the low half of a 64-bit integer."""

    def codegen(c: Any, b: Builder, _s: Any, a: Any) -> Any:
        store(b, b.trunc(a[1], I32), a[0])
        return c.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def read_i16(context: Any, address: Any) -> Any:
    """One 16-bit integer at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.sext(load(b, a[0], I16), I64)


@intrinsic
def read_i64(context: Any, address: Any) -> Any:
    """One 64-bit integer at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: load(b, a[0], I64)


@intrinsic
def read_u8(context: Any, address: Any) -> Any:
    """One unsigned byte at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.zext(load(b, a[0], I8), I64)


@intrinsic
def read_f16(context: Any, address: Any) -> Any:
    """One half float at an address, widened."""
    return types.float32(types.int64), lambda _c, b, _s, a: b.fpext(load(b, a[0], F16), F32)
