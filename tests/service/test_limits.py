"""Limits of a tenant on the running service, with a true minute."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.running import running

MODEL = "smollm2-135m"


async def make_tenant(client: httpx.AsyncClient, tenant: str, **limits: Any) -> str:
    """An administrator's key of a new tenant with these limits."""
    about = {"subject_kind": "tenant", "subject_id": tenant}
    for path, body in [
        ("tenants", {"id": tenant}),
        ("limits", {**about, **limits}),
        ("keys", {"tenant_id": tenant, "name": "test", "is_admin": True}),
    ]:
        answer = await client.post(f"/api/admin/{path}", json=body)
        assert answer.is_success, answer.text
    return str(answer.json()["key"])


async def own_usage(client: httpx.AsyncClient) -> dict[str, Any]:
    """The totals of the caller's tenant."""
    rows: list[dict[str, Any]] = (await client.get("/api/usage", params={"group_by": ""})).json()["usage"]
    return rows[0]


@pytest.mark.slow
async def test_a_token_limit_holds_for_a_true_minute_and_service_resumes(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--no-console") as service:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(
            base_url=service.url, timeout=90, limits=limits, trust_env=False
        ) as client:
            key = await make_tenant(client, "minute", tokens_per_minute=1000)
            client.headers["authorization"] = f"Bearer {key}"
            served_at: list[tuple[float, float]] = []

            async def ask() -> httpx.Response:
                body = {"model": MODEL, "prompt": [500] * 30, "max_tokens": 20, "ignore_eos": True}
                sent_at = time.monotonic()
                answer = await client.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    assert answer.json()["usage"]["total_tokens"] == 50
                    served_at.append((sent_at, time.monotonic()))
                return answer

            # 30 + 20 = 50 tokens each: exactly 20 of them fit into 1,000.
            first = await asyncio.gather(*(ask() for _ in range(50)))
            assert sorted(answer.status_code for answer in first) == [200] * 20 + [429] * 30
            waits_s = [int(a.headers["retry-after-ms"]) / 1000 for a in first if a.status_code == 429]
            # From the end of the one-second slot of the first charge on; all were sent within a second or two.
            assert 55 < min(waits_s) <= max(waits_s) <= 61
            free_at = max(end for _, end in served_at) + max(waits_s)
            while time.monotonic() < free_at - 10:
                assert (await ask()).status_code == 429
                await asyncio.sleep(2)
            await asyncio.sleep(free_at - time.monotonic())
            again = await asyncio.gather(*(ask() for _ in range(50)))
            assert sorted(answer.status_code for answer in again) == [200] * 20 + [429] * 30
            # Nobody of the second twenty was charged within 60 s of the charges of the first.
            served_at.sort()
            assert served_at[20][1] - served_at[0][0] >= 60
            async with asyncio.timeout(10):
                while (used := await own_usage(client))["requests"] < 40:
                    await asyncio.sleep(0.05)
            assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (40, 1200, 800)
