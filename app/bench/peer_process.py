"""A peer engine in a process of its own interpreter, spoken to in JSON lines: no peer is a dependency of ours."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPT = Path(__file__).with_name("peer_side.py")


class PeerError(Exception):
    """A peer that is not there or that failed; the message says which and what it said."""


class PeerProcess:
    """One peer. Use it as a context manager: its process ends with it."""

    def __init__(self, python: Path, name: str, *, script: Path = SCRIPT) -> None:
        """Start `script name` with the interpreter `python`. Raises PeerError when that cannot be run."""
        self.name = name
        self.version = "unknown"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        try:
            self._process = subprocess.Popen(
                [python, "-I", script, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"--peer-python {python}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, model_path: Path, threads: int) -> None:
        """Load the model. Raises PeerError, also when this interpreter does not have the peer."""
        self.version = self.ask("load", model_path=str(model_path), threads=threads)["version"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer. Raises PeerError when the peer failed or ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip()[-500:]
            raise PeerError(f"{self.name} ended in `{do}`: {said or 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}, {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def find_peers(pythons: Sequence[Path], models: Mapping[str, Path], threads: int) -> list[PeerProcess]:
    """Every peer of `models` that one of the interpreters has, with its model loaded.

    Raises PeerError when an interpreter has none.
    """
    found: list[PeerProcess] = []
    try:
        for python in pythons:
            before, reasons = len(found), []
            for name, model_path in models.items():
                peer = PeerProcess(python, name)
                try:
                    peer.load(model_path, threads)
                except PeerError as error:
                    peer.close()
                    reasons.append(str(error))
                else:
                    found.append(peer)
            if len(found) == before:
                raise PeerError(f"--peer-python {python}: has no peer ({'; '.join(reasons)})")
    except PeerError:
        for peer in found:
            peer.close()
        raise
    return found
