import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.cases import Access
from tests.service.running import running

MODEL = "smollm2-135m"


@pytest.fixture(scope="package")
def access(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """A service of its own, with one prefill and one decode worker, and the keys that the cases need."""
    with running(tmp_path_factory.mktemp("conformance"), "--no-console") as service:
        keys: dict[str, str] = {}
        with httpx.Client(base_url=service.url, timeout=30, trust_env=False) as client:

            def post(path: str, **body: Any) -> Any:
                answer = client.post(f"/api/admin/{path}", json=body)
                assert answer.is_success, answer.text
                return answer.json()

            post("tenants", id="conformance")
            scopes: dict[str, dict[str, Any]] = {
                "operator": {"is_admin": True},
                "narrow": {"models": ["another-model"]},
                "limited": {},
                "single": {},
            }
            for name, scope in scopes.items():
                made = post("keys", tenant_id="conformance", name=name, **scope)
                keys[name] = made["key"]
                client.headers["authorization"] = f"Bearer {keys['operator']}"
                if name in ("limited", "single"):
                    limit = {"requests_per_minute": 1} if name == "limited" else {"concurrent_requests": 1}
                    post("limits", subject_kind="key", subject_id=made["id"], **limit)
        yield Access(service.url, MODEL, keys)


@pytest.fixture
def access_file(access: Access, tmp_path: Path) -> Path:
    """What a process of its own must know to run the cases."""
    file = tmp_path / "access.json"
    file.write_text(json.dumps({"url": access.url, "model": access.model, "keys": access.keys}))
    return file
