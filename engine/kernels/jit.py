"""The one door to Numba: typed, cached on disk, compiled when asked to and not before.

Machine code is cached under `NUMBA_CACHE_DIR`, else `kernels` in `CLOUDMATRIX_CACHE_DIR` (default
`~/.cache/cloudmatrix`), in a folder named after the sources of this package and of what it takes constants from:
Numba's own check sees only the file of the outermost function, not the files of what it inlines.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.core.cgutils
import numba.core.codegen
import numba.core.typing.templates
import numba.extending

from engine.kernels import arm

Signature = tuple[Any, ...]
Progress = Callable[[int, int, str], None]


def _cache_folder() -> Path:
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        cache = os.environ.get("CLOUDMATRIX_CACHE_DIR") or str(Path.home() / ".cache" / "cloudmatrix")
        base = str(Path(cache) / "kernels")
    digest = hashlib.sha256()
    here = Path(__file__).parent
    # Machine code holds constants from there.
    for source in (*sorted(here.glob("*.py")), here.parent / "weights" / "quantise.py"):
        digest.update(source.read_bytes())
    return Path(base) / digest.hexdigest()[:16]


numba_config: Any = numba.config
numba_config.CACHE_DIR = str(_cache_folder())
arm.announce(numba_config, numba.core.codegen.get_host_cpu_features())


# Numba is typed in part, for uses other than these.
types: Any = numba.core.types
cgutils: Any = numba.core.cgutils
templates: Any = numba.core.typing.templates
extending: Any = numba.extending


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function that emits LLVM IR; literal arguments arrive as literal types."""
    return extending.intrinsic(prefer_literal=True)(function)


def overload(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """What `function` means in compiled code, chosen by the types of its arguments."""
    decorate: Callable[[Callable[..., Any]], Any] = extending.overload(function)
    return decorate


def jit(function: Callable[..., Any]) -> Any:
    """Compile to machine code that releases the GIL and is kept on disk."""
    return numba.njit(nogil=True, cache=True)(function)


def inline(function: Callable[..., Any]) -> Any:
    """A helper that disappears into its callers; it has no cache entry of its own."""
    return numba.njit(nogil=True)(function)


def compile_all(wanted: list[tuple[Any, Signature]], progress: Progress | None = None) -> None:
    """Compile each function for its signature; calls `progress(done, total, label)` before each and at the end."""
    for done, (dispatcher, signature) in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted), dispatcher.__name__)
        dispatcher.compile(signature)
    if progress is not None:
        progress(len(wanted), len(wanted), "kernels")
