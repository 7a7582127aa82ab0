"""Lines on disk until somebody has taken care of them: what is lost with a process is found by the next one.

A line is written with one call to the system before anything else happens, so it outlives the process, however that
ends. It does not outlive a power cut in the seconds before the system writes it out.

Each process has files of its own in the folder and holds a lock on them; a file that nobody holds is an orphan.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path


class Spool:
    """A process's lines under `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._path, self._descriptor = self._create()
        self._old: list[tuple[Path, int]] = []
        self.num_bytes = 0
        """Of the file that is written to."""

    def append(self, line: bytes) -> None:
        """Keep a line; it holds no line break."""
        data = line + b"\n"
        os.write(self._descriptor, data)
        self.num_bytes += len(data)

    def start_anew(self, lines: Sequence[bytes]) -> None:
        """Go on in another file, which begins with `lines`; the others wait for `forget_old`."""
        self._old.append((self._path, self._descriptor))
        self._path, self._descriptor = self._create()
        self.num_bytes = 0
        if lines:
            self.append(b"\n".join(lines))

    def forget_old(self) -> None:
        """Everything in the files before the last `start_anew` has been taken care of."""
        for path, descriptor in self._old:
            path.unlink(missing_ok=True)
            os.close(descriptor)
        self._old.clear()

    def close(self, *, forget: bool) -> None:
        """Let go of the files; with `forget` everything in them has been taken care of."""
        if forget:
            self.start_anew([])
            self.forget_old()
            self._path.unlink(missing_ok=True)
        for _, descriptor in self._old:
            os.close(descriptor)
        self._old.clear()
        os.close(self._descriptor)

    @contextlib.contextmanager
    def orphans(self) -> Iterator[tuple[list[Path], list[bytes]]]:
        """Files that their process left behind, and their whole lines; nobody else can have them meanwhile."""
        with contextlib.ExitStack() as held:
            paths, lines = [], list[bytes]()
            for path in sorted(self._folder.glob("*.jsonl")):
                with contextlib.suppress(OSError):
                    descriptor = os.open(path, os.O_RDONLY)
                    held.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    paths.append(path)
                    whole, _, _torn = path.read_bytes().rpartition(b"\n")
                    lines += whole.split(b"\n") if whole else []
            yield paths, lines

    def _create(self) -> tuple[Path, int]:
        path = self._folder / f"{secrets.token_hex(8)}.jsonl"
        # Locked under a name that nobody looks for, so that no other process takes it for an orphan.
        hidden = path.with_suffix(".new")
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        hidden.rename(path)
        return path, descriptor
