"""The order of the rooms, observe <- fabric <- memory_pool <- engine <- app, and what the gateway sees of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["observe", "fabric", "memory_pool", "engine", "app"]
GATEWAY = ["app/gateway.py", "app/api", "app/routing", "app/metrics.py", "app/settings.py", "app/errors.py"]
GATEWAY_SEES = {
    "engine": {"protocol", "config", "timeline"},
    "memory_pool": {"keys", "async_client", "directory", "pins", "shared_prefixes", "statistics"},
}
KNOWS_REDIS = {"memory_pool/connection.py"}


def sources(*places: str) -> list[Path]:
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of every module a file imports, also inside functions."""
    package = list(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_rooms_below(room: str) -> None:
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests"}
    wrong = {
        str(path.relative_to(ROOT)): sorted(name for name in imports(path) if name.split(".")[0] in above)
        for path in sources(room)
    }
    assert {path: names for path, names in wrong.items() if names} == {}
    assert wrong, f"no source found in {room}"


def test_gateway_sees_only_names_and_statistics_of_engine_and_pool() -> None:
    wrong = []
    for path in sources(*GATEWAY):
        for name in imports(path):
            room, _, rest = name.partition(".")
            if room in GATEWAY_SEES and rest and rest.split(".")[0] not in GATEWAY_SEES[room]:
                wrong.append((str(path.relative_to(ROOT)), name))
    assert wrong == []


def test_redis_is_known_in_one_file() -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for path in sources(*ROOMS)
        if any(name.split(".")[0] == "redis" for name in imports(path))
    }
    assert knowing <= KNOWS_REDIS
    assert knowing, "nobody imports redis any more: this test looks at nothing"
