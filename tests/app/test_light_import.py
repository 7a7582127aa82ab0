"""The gateway starts fast because it leaves the engine's weight behind."""

import subprocess
import sys


def test_the_gateway_imports_neither_numba_nor_the_engine() -> None:
    program = (
        "import sys, app.gateway; heavy = ('numba', 'llvmlite', 'matplotlib', 'engine.model', 'engine.worker'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
