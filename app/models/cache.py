"""Where models lie on this machine: one folder each, visible only when complete."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.models.entry import ModelError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def models_dir() -> Path:
    """`models` in `CLOUDMATRIX_CACHE_DIR`, by default `~/.cache/cloudmatrix`."""
    root = os.environ.get("CLOUDMATRIX_CACHE_DIR")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "cloudmatrix") / "models"


def model_folder(name: str) -> Path:
    """Where the model of that name lies or would lie. Raises ModelError when it cannot be a name."""
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"model name {name!r}: use 1 to 96 letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return models_dir() / name


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time fetches or adds a model of that name; others wait here."""
    folder = model_folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{name}.lock").open("w")
    except OSError as error:
        raise ModelError(f"{folder.parent}: the model cache cannot be written: {error}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """A folder to fill; it takes the model's place at the end, and goes without a trace if that is not reached.

    Call with the model's lock held: what an earlier attempt left behind (killed, power lost) is removed.
    """
    final = model_folder(name)
    prefix = f".{name}.part-"
    for left in final.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        yield building
        building.chmod(0o755)
        if final.exists():
            # A folder cannot replace another in one step; a crash in between only costs another fetch.
            shutil.rmtree(final)
        building.rename(final)
    except OSError as error:
        raise ModelError(f"{final}: the model could not be stored: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
