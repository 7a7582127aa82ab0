"""The one door to Numba: typed, cached on disk, compiled when asked to and not before.

Machine code is cached under `NUMBA_CACHE_DIR` (default `~/.cache/cloudmatrix/kernels`) in a folder named after
the sources of this package: Numba's own check sees only the file of the outermost function, not the files of
what it inlines.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numba
from numba import config as numba_config

Signature = tuple[Any, ...]
Function = TypeVar("Function", bound=Callable[..., Any])
Progress = Callable[[int, int, str], None]


class Dispatcher(Protocol):
    """A compiled function and the signatures it has been compiled for."""

    __name__: str
    signatures: list[Signature]

    def compile(self, sig: Signature) -> object:
        """Compile for `sig`, or load that from the cache."""


def _cache_folder() -> Path:
    base = os.environ.get("NUMBA_CACHE_DIR") or str(Path.home() / ".cache" / "cloudmatrix" / "kernels")
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(base) / digest.hexdigest()[:16]


numba_config.CACHE_DIR = str(_cache_folder())


def jit(function: Function) -> Function:
    """Compile to machine code that releases the GIL and is kept on disk."""
    return cast(Function, numba.njit(nogil=True, cache=True)(function))


def inline(function: Function) -> Function:
    """A helper that disappears into its callers; it has no cache entry of its own."""
    return cast(Function, numba.njit(nogil=True)(function))


def compile_all(wanted: list[tuple[Callable[..., Any], Signature]], progress: Progress | None = None) -> None:
    """Compile each function for its signature; calls `progress(done, total, label)` before each and at the end."""
    for done, (function, signature) in enumerate(wanted):
        dispatcher = cast(Dispatcher, function)
        if progress is not None:
            progress(done, len(wanted), dispatcher.__name__)
        dispatcher.compile(signature)
    if progress is not None:
        progress(len(wanted), len(wanted), "kernels")
