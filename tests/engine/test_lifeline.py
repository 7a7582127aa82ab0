import os
import subprocess
import sys

from engine.lifeline import PARENT_VARIABLE

CHILD = """
import time
from engine.lifeline import exit_with_parent
exit_with_parent()
print("up", flush=True)
time.sleep(30)
"""


def start(parent: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, PARENT_VARIABLE: str(parent)},
        stdout=subprocess.PIPE,
    )


def test_a_child_whose_parent_was_gone_before_it_could_ask_leaves() -> None:
    with start(parent=2**22 - 1) as child:  # an id that this process does not have
        assert child.wait(timeout=20) != 0


def test_a_child_stays_while_its_parent_lives() -> None:
    with start(parent=os.getpid()) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        try:
            child.wait(timeout=1.5)  # three looks at the parent
            raise AssertionError("left although its parent lives")
        except subprocess.TimeoutExpired:
            pass
        child.kill()
