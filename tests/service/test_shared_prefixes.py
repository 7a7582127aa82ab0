"""Prefixes that an administrator opened are shared by tenants, and nothing else is; prefixes that tenants pin stay."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from tests.memory_pool.conftest import poll
from tests.service.running import Service, running

ADMIN = {"authorization": "Bearer operator-key"}
BLOCK_TOKENS = 32
SYSTEM = "You answer for the Harbour Library. " + " ".join(
    f"Rule {i}: shelf {i} is quiet." for i in range(20)
)
QUESTION = "Which shelves may I talk at? " + " ".join(f"I like shelf {i}." for i in range(20))


def admin(client: httpx.Client, path: str, status: int = 201, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/admin/{path}", json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ask(client: httpx.Client, key: str, system: str) -> tuple[int, str]:
    """Cached tokens and the answer."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
    body = {"model": "smollm2-135m", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return int(cached), str(found["choices"][0]["message"]["content"])


def newest_miss(client: httpx.Client, headers: dict[str, str]) -> str | None:
    """Why the first block missing of the newest request was missing, as the bearer of a key may know it."""
    newest = client.get("/api/requests", params={"limit": 1}, headers=headers).json()["requests"][0]
    found: str | None = newest["reuse"][0]["miss_reason"]
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUDMATRIX_API_KEYS", "operator-key")
        args = ("--prefill", "0", "--decode", "0", "--both", "1", "--no-console")
        with running(tmp_path_factory.mktemp("tenants"), *args) as started:
            yield started


@pytest.fixture(scope="module")
def keys(service: Service) -> dict[str, str]:
    """A key of each of two tenants."""
    made = {}
    with service.client() as client:
        for tenant in ("one", "two"):
            admin(client, "tenants", id=tenant)
            made[tenant] = admin(client, "keys", tenant_id=tenant, name="test")["key"]
    return made


def test_tenants_share_what_was_opened_and_nothing_else(service: Service, keys: dict[str, str]) -> None:
    with service.client() as client:
        own = "Nobody else knows this. " + SYSTEM
        cached, text = ask(client, keys["one"], own)
        assert cached == 0
        assert ask(client, keys["two"], own) == (0, text)  # never what another tenant wrote
        as_two = {"authorization": f"Bearer {keys['two']}"}
        # Only an administrator learns that somebody else has written this.
        assert (newest_miss(client, ADMIN), newest_miss(client, as_two)) == ("other_namespace", "never_seen")
        assert "other_namespace" not in client.get("/metrics").text
        assert ask(client, keys["two"], own)[0] > 0, "the cache is live"

        prefix = admin(
            client, "pool/shared", name="library", messages=[{"role": "system", "content": SYSTEM}]
        )
        assert prefix["num_blocks"] == prefix["num_tokens"] // BLOCK_TOKENS > 3
        cached, text = ask(client, keys["one"], SYSTEM)
        assert cached == 0
        # Of the same prompt the other tenant finds what was opened, to the block, and not the question behind it.
        assert ask(client, keys["two"], SYSTEM) == (prefix["num_blocks"] * BLOCK_TOKENS, text)
        pool = client.get("/api/pool", headers=ADMIN).json()
        assert pool["namespaces"]["shared"]["blocks"] == prefix["num_blocks"]
        listed = client.get("/api/admin/pool/shared", headers=ADMIN).json()["shared"]
        assert [each["name"] for each in listed] == ["library"]
        assert (
            client.get(
                "/api/admin/pool/shared", headers={"authorization": f"Bearer {keys['one']}"}
            ).status_code
            == 403
        )

        assert client.delete("/api/admin/pool/shared/library", headers=ADMIN).status_code == 200
        assert client.delete("/api/admin/pool/shared/library", headers=ADMIN).status_code == 404
        assert ask(client, keys["one"], SYSTEM) == (0, text)  # its own names now
        admin(client, "pool/shared", 400, name="short", prompt="Hello")


def test_tenants_pin_their_own_prefixes(service: Service, keys: dict[str, str]) -> None:
    one, two = ({"authorization": f"Bearer {keys[tenant]}"} for tenant in ("one", "two"))
    body = {"name": "rules", "messages": [{"role": "system", "content": "Pinned. " + SYSTEM}], "ttl_s": 600}
    with (
        service.client() as client,
        redis.Redis.from_url((service.data_dir / "redis" / "url").read_text()) as pool,
    ):
        ask(client, keys["one"], "Pinned. " + SYSTEM)
        made = client.post("/api/pins", json=body, headers=one)
        assert made.status_code == 201, made.text
        assert made.json()["namespace"] == "tenant:one"
        assert made.json()["ends_in_s"] == 600

        def held() -> int:
            """Blocks that Redis itself may not evict, because they have no time to live."""
            return sum(pool.ttl(name) == -1 for name in pool.scan_iter("cm:b:*"))

        poll(lambda: held() == made.json()["num_blocks"])
        assert [pin["name"] for pin in client.get("/api/pins", headers=one).json()["pins"]] == ["rules"]
        assert client.get("/api/pins", headers=two).json()["pins"] == []
        assert client.delete("/api/pins/rules", headers=two).status_code == 404
        assert client.post("/api/pins", json=body | {"tenant": "one"}, headers=two).status_code == 403
        assert client.post("/api/pins", json=body | {"ttl_s": 0}, headers=one).status_code == 400
        assert client.delete("/api/pins/rules", headers=one).status_code == 200
        poll(lambda: held() == 0)
