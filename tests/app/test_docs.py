"""docs/gateway.md names every setting with its default, every metric and every route, and nothing else."""

import re
from pathlib import Path
from typing import Any

from app.gateway import create_app
from app.requests.served import ServedModel
from app.settings import Settings
from memory_pool.acl import rules
from tests.app.conftest import FakeDirectory, FakePool, Gateway

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_settings_are_documented_with_their_defaults() -> None:
    rows = dict(re.findall(r"\| `(CLOUDMATRIX_[A-Z_]+)` \| ([^|]+) \|", TEXT))
    fields = Settings.model_fields
    assert set(rows) == {f"CLOUDMATRIX_{name.upper()}" for name in fields}
    for name, field in fields.items():
        documented = rows[f"CLOUDMATRIX_{name.upper()}"].strip()
        default: Any = field.default
        if isinstance(default, float):
            assert float(documented) == default, name
        else:
            assert documented == ("none" if default in ((), None) else str(default)), name


async def test_metrics_are_documented(gateway: Gateway) -> None:
    exposed = (await gateway.http.get("/metrics")).text
    names = {re.sub(r"_total$", "", name) for name in re.findall(r"^# TYPE (\S+)", exposed, re.MULTILINE)}
    documented = set(re.findall(r"`((?:vllm:|cloudmatrix_)[a-z0-9_]+)`", TEXT))
    assert documented == names


def test_routes_are_documented(served: ServedModel) -> None:
    pool: Any = FakePool()
    app = create_app(Settings(), models={served.id: served}, directory=FakeDirectory(), pool=pool)
    paths: dict[str, dict[str, Any]] = app.openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    documented = {
        re.sub(r"\{\w+\}", "{}", route) for route in re.findall(r"`((?:GET|POST|DELETE) /[^`]+)`", TEXT)
    }
    assert documented == {re.sub(r"\{\w+\}", "{}", route) for route in routes}


def test_every_named_fault_has_its_test() -> None:
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| (.+) \|$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 20, "the numbered list that it began with"
    named = [test for _, tests in rows for test in re.findall(r"`(tests/[^`]+)`", tests)]
    assert len(named) >= len(rows)
    check_that_they_exist(named)


def test_every_promise_of_security_has_its_test_and_the_rules_for_redis_are_the_ones_printed() -> None:
    _, _, section = OPERATIONS.partition("\n## Security\n")
    rows = re.findall(r"^\| (.+) \| `(tests/[^`]+)` \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) >= 14
    check_that_they_exist([test for _, test in rows])
    rule = f"ACL SETUSER cloudmatrix-gateway on >PASSWORD {' '.join(rules('gateway'))}\n"
    assert rule in OPERATIONS


def check_that_they_exist(tests: list[str]) -> None:
    for file, _, name in (test.partition("::") for test in tests):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)
