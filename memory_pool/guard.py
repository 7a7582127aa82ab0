"""Keeps one child process running and ends it when the parent goes, however the parent goes.

`python guard.py PROGRAM [ARGUMENT ...]`: the length of the child's input on one line of standard input, then that
input; after it, standard input stays open for as long as the parent lives. When it closes (also after a `kill -9` of
the parent) the child is ended. Where Linux can, the kernel ends the child together with the guard, too. A child that
dies is started again, unless it gave up at once (a configuration it refuses).

    start -> running -> (died)        -> start
                     -> (parent gone) -> ended
                     -> (gave up at once) -> the guard ends, too

The guard runs in a session of its own: a Ctrl-C in the terminal reaches only the parent, which decides.
"""

import contextlib
import ctypes
import io
import signal
import subprocess
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0
_TOO_SOON_S = 1.0
_PAUSE_S = 0.1


def _die_with_guard() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Guard:
    def __init__(self, argv: list[str], parent: io.FileIO) -> None:
        self._argv = argv
        self._parent = parent
        self._input = self._read_input()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = False

    def run(self) -> int:
        """Until the parent goes or the child does not stay up; its exit status. Called from the main thread: the
        kernel's signal to the child comes when the *thread* that started it ends."""
        threading.Thread(target=self._watch_parent, daemon=True).start()
        while True:
            started_at = time.monotonic()
            with self._lock:
                if self._ending:
                    return 0
                child = self._child = self._start()
            status = child.wait()
            if self._ending or (status >= 0 and time.monotonic() - started_at < _TOO_SOON_S):
                return status
            time.sleep(_PAUSE_S)

    def end(self) -> None:
        with self._lock:
            self._ending = True
            child = self._child
        if child is None:
            return
        child.terminate()
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(self._argv, stdin=subprocess.PIPE, preexec_fn=_die_with_guard)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(self._input)
            child.stdin.close()
        return child

    def _watch_parent(self) -> None:
        while self._parent.read(4096):
            pass
        self.end()

    def _read_input(self) -> bytes:
        head = b""
        while not head.endswith(b"\n"):
            head += self._parent.read(1) or sys.exit("the parent went before it said what to run")
        data = b""
        while len(data) < int(head):
            data += self._parent.read(int(head) - len(data)) or sys.exit("the parent went before it said all")
        return data


def main() -> int:
    """The child's last exit status."""
    # Unbuffered: a blocked read of the buffered file would keep the interpreter from ending.
    guard = _Guard(sys.argv[1:], io.FileIO(0, closefd=False))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=guard.end).start())
    return guard.run()


if __name__ == "__main__":
    sys.exit(main())
