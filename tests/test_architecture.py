"""The map in docs/architecture.md names every module that is there, and none that is not."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ["observe", "fabric", "memory_pool", "engine", "app"]


def test_the_map_is_complete_and_true() -> None:
    mapped = set(
        re.findall(r"^\| `([\w/]+\.py)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    )
    modules = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.read_text().strip()
    }
    assert mapped - modules == set(), "modules that are gone are still on the map"
    assert modules - mapped == set(), "modules are missing on the map"
