"""Whether a pinned dependency has a known vulnerability: pip-audit's answer, turned into a verdict for `make check`.

    python tools/audit.py [constraints.txt]

A machine that cannot reach the advisories (no internet, another package index) says so in one line and passes; a known
vulnerability fails.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 60.0
"""How long the audit may take; then it counts as not done."""


@dataclass(frozen=True)
class Verdict:
    """What to print, and whether the check passes."""

    passes: bool
    lines: tuple[str, ...]


def judge(report: str, complaint: str) -> Verdict:
    """The verdict on what pip-audit wrote: `report` to stdout (JSON, or nothing), `complaint` to stderr."""
    try:
        dependencies = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = complaint.strip().splitlines()
        return _not_audited(said[-1] if said else "pip-audit gave no report")
    audited = [dependency for dependency in dependencies if "skip_reason" not in dependency]
    skipped = [dependency for dependency in dependencies if "skip_reason" in dependency]
    found = tuple(
        f"{dependency['name']} {dependency['version']}: {vulnerability['id']}, "
        + (
            f"fixed in {', '.join(fixed)}"
            if (fixed := vulnerability["fix_versions"])
            else "no fixed version yet"
        )
        for dependency in audited
        for vulnerability in dependency["vulns"]
    )
    if found:
        return Verdict(False, found)
    if not audited:
        return _not_audited(skipped[0]["skip_reason"] if skipped else "no dependency was listed")
    left_out = f"; not audited: {', '.join(entry['name'] for entry in skipped)}" if skipped else ""
    return Verdict(True, (f"{len(audited)} dependencies have no known vulnerability{left_out}",))


def _not_audited(reason: str) -> Verdict:
    return Verdict(True, (f"not audited: {reason}",))


def audit(constraints: Path) -> Verdict:
    """Run pip-audit on a file of pinned versions."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(constraints),
        "--no-deps",
        "--disable-pip",
    ]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return _not_audited(f"the advisory service took longer than {LIMIT_S:.0f} s")
    return judge(done.stdout, done.stderr)


def main() -> int:
    """Exit status 1 for a known vulnerability, 2 for a file that is not there, else 0."""
    constraints = Path(sys.argv[1] if len(sys.argv) > 1 else "constraints.txt")
    if not constraints.is_file():
        sys.stderr.write(f"{constraints}: there is no such file\n")
        return 2
    verdict = audit(constraints)
    sys.stdout.write("".join(f"{line}\n" for line in verdict.lines))
    return 0 if verdict.passes else 1


if __name__ == "__main__":
    sys.exit(main())
