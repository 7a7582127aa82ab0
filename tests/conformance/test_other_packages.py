"""The same cases by the packages that this environment does not have: the other major version, and npm's."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conformance.cases import CASES

HERE = Path(__file__).parent
OTHER_MAJOR = "openai>=2,<3" if int(openai.__version__.split(".")[0]) >= 3 else "openai>=3,<4"
NPM_PACKAGE = "openai@^6"
INSTALL_TIMEOUT_S = 240
RUN_TIMEOUT_S = 200


def results(*argv: str) -> dict[str, Any]:
    """Error of every case (None: passed), as the process reports it."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    sys.stdout.write(f"{lines[0]['package']}: {len(lines)} cases\n")
    return {line["case"]: line["error"] for line in lines}


def install(*argv: str, cwd: Path) -> None:
    done = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_other_major_version(access_file: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", OTHER_MAJOR, cwd=tmp_path)
    assert results(python, str(HERE / "cases.py"), str(access_file)) == dict.fromkeys(CASES)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")
def test_the_package_of_npm(access_file: Path, tmp_path: Path) -> None:
    install(
        "npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", ".", NPM_PACKAGE, cwd=tmp_path
    )
    script = shutil.copy(HERE / "cases.mjs", tmp_path / "cases.mjs")  # where it finds the package
    assert results("node", script, str(access_file)) == dict.fromkeys(CASES)


def test_both_languages_have_the_same_cases() -> None:
    names = re.findall(r"^CASES\.(\w+) = ", (HERE / "cases.mjs").read_text(), re.MULTILINE)
    assert names == list(CASES)
