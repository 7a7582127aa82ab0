"""The paths of processors that this machine is not compile: their code is generated for them here, and not run."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels import available

FEATURES = (
    "+amx-int8,+amx-tile,+avx512vnni,+avx512bw,+avx512vl,+avx512f,+avx512dq,+avx512cd,"
    "+avx2,+fma,+f16c,+avx,+bmi,+bmi2"
)
PATHS = [path for path in ("amx", "vnni", "avx2") if path not in available()]
# What differs from path to path; without LLVM's optimisations, which take most of the time.
SCRIPT = """
import sys
from engine.kernels import attention, rows, step
from engine.kernels.isa import IsaType
from engine.kernels.jit import compile_all, types
tag, i64, f32 = IsaType(sys.argv[1]), types.int64, types.float32
compile_all([
    (rows.quantise_row, (tag, *(i64,) * 8, f32, i64)),
    (attention.attend, (tag, *(i64,) * 15)),
    (step.multiply_chunk, (tag, *(i64,) * 9)),
])
"""


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="paths of another architecture"
)
@pytest.mark.skipif(not PATHS, reason="this machine has them all: other tests run them")
def test_paths_of_other_processors_compile(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, path],
            env=os.environ
            | {
                "NUMBA_CPU_NAME": "sapphirerapids",
                "NUMBA_CPU_FEATURES": FEATURES,
                "NUMBA_CACHE_DIR": str(tmp_path / path),
                "NUMBA_OPT": "0",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in PATHS
    ]
    for path, run in zip(PATHS, runs, strict=True):
        _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, f"{path}: {errors[-2000:]}"
