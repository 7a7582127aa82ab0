import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.cases import Access
from tests.service.running import running

MODEL = "smollm2-135m"
TENANT = "conformance"


class Administrator:
    """Makes keys on a service that had none."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.url = str(client.base_url).rstrip("/")
        self.post("/api/admin/tenants", id=TENANT)
        self.key = self.make_key("operator", is_admin=True)
        client.headers["authorization"] = f"Bearer {self.key}"

    def make_key(self, name: str, limits: dict[str, int] | None = None, **scope: Any) -> str:
        made = self.post("/api/admin/keys", tenant_id=TENANT, name=name, **scope)
        if limits:
            self.post("/api/admin/limits", subject_kind="key", subject_id=made["id"], **limits)
        return str(made["key"])

    def post(self, path: str, **body: Any) -> Any:
        answer = self._client.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()


@pytest.fixture(scope="package")
def administrator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Administrator]:
    """Of a service of its own, with one prefill and one decode worker."""
    with (
        running(tmp_path_factory.mktemp("conformance"), "--no-console") as service,
        service.client(timeout_s=30) as client,
    ):
        yield Administrator(client)


@pytest.fixture
def access(administrator: Administrator) -> Access:
    """What a case must know; the keys with limits are new."""
    keys = {
        "operator": administrator.key,
        "narrow": administrator.make_key("narrow", models=["another-model"]),
        "limited": administrator.make_key("limited", {"requests_per_minute": 1}),
        "single": administrator.make_key("single", {"concurrent_requests": 1}),
    }
    return Access(administrator.url, MODEL, keys)


@pytest.fixture
def access_file(access: Access, tmp_path: Path) -> Path:
    """The same for a process of its own."""
    file = tmp_path / "access.json"
    file.write_text(json.dumps({"url": access.url, "model": access.model, "keys": access.keys}))
    return file
