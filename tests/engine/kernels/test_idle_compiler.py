import subprocess
import sys

import pytest

CHILD = """
from pathlib import Path
import numba
from engine.kernels import idle_compiler

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

numba.njit(lambda x: x + 1)(1)
before = resident()
print(idle_compiler.give_back(), before - resident(), numba.njit(lambda x: x + 2)(1.0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_the_compiler_gives_its_code_back_and_still_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=60
    )
    spanned, freed, result = done.stdout.split()
    # A compiled function touched at least some 10 MB of LLVM; compiling another one afterwards gives 1.0 + 2.
    assert int(spanned) > int(freed) > 10_000_000
    assert result == "3.0"
