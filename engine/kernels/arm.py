"""Whether a 64-bit ARM processor has the dot product of four bytes, and Numba told that it has.

LLVM's list of a host's features never names it (it passes over Linux's `asimddp`), and generates it unasked only
for processors that it knows by name; for any other it ends the process over an instruction it cannot select.
"""

import ctypes
import platform
from typing import Any

AT_HWCAP = 16
HWCAP_ASIMDDP = 1 << 20
FEATURE = "+dotprod"


def has_dot_product() -> bool:
    """Whether this is a 64-bit ARM processor with `sdot`, as the kernel says."""
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return False
    if platform.system() == "Linux":
        return bool(hardware_capabilities() & HWCAP_ASIMDDP)
    return platform.system() == "Darwin"  # every Mac with such a processor has it


def hardware_capabilities() -> int:
    """The bits by which Linux tells a process what its processor can do; 0 if it does not."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(AT_HWCAP))


def announce(config: Any, host_features: str) -> None:
    """Have Numba generate code for a host with `host_features`, or with those its user asked for, and `sdot`."""
    if has_dot_product():
        wanted = host_features if config.CPU_FEATURES is None else config.CPU_FEATURES
        config.CPU_FEATURES = ",".join(filter(None, (wanted, FEATURE)))
