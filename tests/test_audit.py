"""The verdict on the dependencies: a known vulnerability fails, and a machine that cannot know passes and says so."""

import json
from typing import Any

from tools.audit import Verdict, judge

SOUND: dict[str, Any] = {"name": "redis", "version": "5.2.0", "vulns": []}
VULNERABLE: dict[str, Any] = {
    "name": "jinja2",
    "version": "3.1.2",
    "vulns": [
        {"id": "GHSA-h5c8-rqwp-cp95", "fix_versions": ["3.1.3"], "aliases": [], "description": "xmlattr"},
        {"id": "PYSEC-0", "fix_versions": [], "aliases": [], "description": "nobody fixed it"},
    ],
}
SKIPPED: dict[str, Any] = {"name": "numba", "skip_reason": "Dependency not found and could not be audited"}


def report(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies, "fixes": []})


def test_a_known_vulnerability_fails_and_is_named_with_its_remedy() -> None:
    assert judge(report(SOUND, VULNERABLE, SKIPPED), "Found 2 known vulnerabilities in 1 package") == Verdict(
        False,
        (
            "jinja2 3.1.2: GHSA-h5c8-rqwp-cp95, fixed in 3.1.3",
            "jinja2 3.1.2: PYSEC-0, no fixed version yet",
        ),
    )


def test_what_was_skipped_is_named_beside_what_is_sound() -> None:
    assert judge(report(SOUND, SKIPPED), "") == Verdict(
        True, ("1 dependencies have no known vulnerability; not audited: numba",)
    )


def test_nothing_audited_passes_and_says_so() -> None:
    assert judge(report(SKIPPED, SKIPPED), "No known vulnerabilities found") == Verdict(
        True, ("not audited: Dependency not found and could not be audited",)
    )
    assert judge("", "INFO: one\nERROR: Could not connect to the service\n") == Verdict(
        True, ("not audited: ERROR: Could not connect to the service",)
    )
    assert judge("", "").passes
