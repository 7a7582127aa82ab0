"""Which integer dot products this machine has, and the tags that choose between them at compile time.

All of them compute the same integers, so every path gives the same tokens.
"""

import ctypes
import platform
from typing import Any

import llvmlite.binding as llvm

from engine.kernels import arm
from engine.kernels.jit import extending, types

LINUX_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


class Isa:
    """A tag: `amx` (tiles for many rows, VNNI for few), `vnni`, `avx2`, `dotprod` (ARM) or `portable`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Isa({self.name!r})"


class IsaType(types.Type):  # type: ignore[misc]  # numba's classes are untyped
    """Numba's type of one tag: each tag has a type of its own."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        super().__init__(name=f"Isa({tag})")


@extending.register_model(IsaType)
class _IsaModel(extending.models.OpaqueModel):  # type: ignore[misc]  # numba's classes are untyped
    pass


def _typeof_isa(value: Isa, _context: Any) -> IsaType:
    return IsaType(value.name)


def _unbox_isa(_kind: IsaType, _value: Any, context: Any) -> Any:
    return extending.NativeValue(context.context.get_dummy_value())


extending.typeof_impl.register(Isa)(_typeof_isa)
extending.unbox(IsaType)(_unbox_isa)


def available() -> tuple[str, ...]:
    """The paths this machine can run, fastest first; `portable` is always among them."""
    features = llvm.get_host_cpu_features()
    machine = platform.machine().lower()
    names = []
    if machine in ("x86_64", "amd64"):
        vnni = features.get("avx512vnni") and features.get("avx512bw") and features.get("avx512vl")
        if vnni and features.get("amx-int8") and _amx_permitted():
            names.append("amx")
        if vnni:
            names.append("vnni")
        if features.get("avx2") and features.get("fma") and features.get("f16c"):
            names.append("avx2")
    elif arm.has_dot_product():
        names.append("dotprod")
    return (*names, "portable")


def choose(wanted: str = "auto") -> Isa:
    """The tag called `wanted`, or the fastest. Raises ValueError when this machine does not have it."""
    have = available()
    if wanted == "auto":
        return Isa(have[0])
    if wanted not in have:
        raise ValueError(f"kernels {wanted!r} not available here; this machine has: {', '.join(have)}")
    return Isa(wanted)


def _amx_permitted() -> bool:
    # Linux gives a process the tile registers on request; threads started later inherit the permission.
    if platform.system() != "Linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(LINUX_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
