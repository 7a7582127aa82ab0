"""A gateway with tenants: keys open what they should, limits hold, and the ledger is what was produced."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.requests.served import ServedModel
from memory_pool.redis_server import RedisServer
from tests.app.conftest import MODEL, Gateway, disaggregated, serving
from tests.app.echo_worker import EchoWorker

ADMIN = {"authorization": "Bearer operator-key"}


@pytest.fixture
async def gateway(served: ServedModel, redis_server: RedisServer) -> AsyncIterator[Gateway]:
    settings = {"redis_url": redis_server.url, "api_keys": "operator-key", "limit_window_s": 3.0}
    async with serving(served, disaggregated(), **settings) as running:
        yield running


async def post(gateway: Gateway, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = await gateway.http.post(f"/api/admin/{path}", json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def new_key(gateway: Gateway, tenant: str, **scopes: Any) -> dict[str, Any]:
    await post(gateway, "tenants", 201, id=tenant)
    return await post(gateway, "keys", 201, tenant_id=tenant, name="test", **scopes)


async def ask(
    gateway: Gateway, key: str, *, prompt: list[int] | None = None, max_tokens: int = 2, **more: Any
) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt or [1, 2, 3], "max_tokens": max_tokens, **more}
    return await gateway.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})


async def usage(gateway: Gateway, **query: str) -> list[dict[str, Any]]:
    answer = await gateway.http.get("/api/admin/usage", params=query, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["usage"]
    return rows


async def until_usage(gateway: Gateway, tenant: str, requests: int) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while (row := (await usage(gateway, tenant=tenant))[0])["requests"] != requests:
        assert time.monotonic() < deadline, row
        await asyncio.sleep(0.05)
    return row


async def test_a_key_is_shown_once_and_ends_when_revoked(gateway: Gateway) -> None:
    made = await new_key(gateway, "shown")
    key = made["key"]
    assert made["shown"] == f"{key[:10]}…{key[-4:]}"
    assert (await ask(gateway, key)).status_code == 200
    listed = await gateway.http.get("/api/admin/keys", headers=ADMIN)
    assert key not in listed.text
    assert key[10:-4] not in listed.text
    await post(gateway, f"keys/{made['id']}/revoke")
    refused = await ask(gateway, key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "revoked_api_key")
    almost = key[:-1] + ("a" if key[-1] != "a" else "b")
    assert (await ask(gateway, almost)).json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("scope", "code"),
    [
        ({"models": ["another"]}, "model_not_allowed"),
        ({"networks": ["10.0.0.0/8"]}, "ip_not_allowed"),
        ({"endpoints": ["/v1/chat/*"]}, "endpoint_not_allowed"),
    ],
)
async def test_scopes_refuse_by_name(gateway: Gateway, scope: dict[str, Any], code: str) -> None:
    made = await new_key(gateway, code.replace("_", "-"), **scope)
    refused = await ask(gateway, made["key"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)


async def test_a_scope_of_models_holds_for_the_list_and_for_tokens(gateway: Gateway) -> None:
    open_key, scoped = await new_key(gateway, "open"), await new_key(gateway, "scoped", models=["another"])
    for made, status in ((open_key, 200), (scoped, 403)):
        headers = {"Authorization": f"Bearer {made['key']}"}
        listed = (await gateway.http.get("/v1/models", headers=headers)).json()["data"]
        assert [card["id"] for card in listed] == ([MODEL] if status == 200 else [])
        answers = [
            await gateway.http.get(f"/v1/models/{MODEL}", headers=headers),
            await gateway.http.post("/tokenize", json={"prompt": "hello"}, headers=headers),
            await gateway.http.post("/tokenize", json={"prompt": "hello", "model": MODEL}, headers=headers),
            await gateway.http.post("/detokenize", json={"tokens": [5]}, headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [status] * 4
        if status == 403:
            assert {answer.json()["error"]["code"] for answer in answers} == {"model_not_allowed"}


async def test_a_key_is_told_who_it_is_and_what_is_left(gateway: Gateway) -> None:
    made = await new_key(gateway, "myself", models=[MODEL])
    limit = {"requests_per_minute": 10, "tokens_per_minute": 1000, "concurrent_requests": 4}
    await post(gateway, "limits", subject_kind="tenant", subject_id="myself", **limit)
    assert (await ask(gateway, made["key"])).status_code == 200
    headers = {"authorization": f"Bearer {made['key']}"}
    deadline = time.monotonic() + 10
    while True:
        answer = await gateway.http.get("/api/me", headers=headers)
        assert answer.status_code == 200, answer.text
        assert made["key"] not in answer.text
        me = answer.json()
        (standing,) = me.pop("limits")
        # 3 tokens of prompt and 2 of answer, once the reservation is settled; asking twice uses nothing.
        if (standing["requests_used"], standing["tokens_used"]) == (1, 5):
            break
        assert time.monotonic() < deadline, standing
        await asyncio.sleep(0.02)
    assert me == {
        "tenant": {"id": "myself", "name": "myself"},
        "user_id": None,
        "key_id": made["id"],
        "is_admin": False,
        "models": [MODEL],
        "networks": None,
        "endpoints": None,
        "expires_at": None,
    }
    assert {name: standing[name] for name in limit} == limit
    assert (standing["monthly_budget"], standing["spent"]) == (None, None)


async def test_a_keys_scopes_and_expiry_change_while_it_is_in_use(gateway: Gateway) -> None:
    made = await new_key(gateway, "rescoped")

    async def code_after(**change: Any) -> str | None:
        await post(gateway, f"keys/{made['id']}", **change)
        answer = await ask(gateway, made["key"])
        return None if answer.status_code == 200 else str(answer.json()["error"]["code"])

    assert await code_after() is None
    assert await code_after(models=["another"]) == "model_not_allowed"
    # What is not named stays, so the model is still refused; null opens it.
    assert await code_after(name="renamed") == "model_not_allowed"
    assert await code_after(models=None, networks=["10.0.0.0/8"]) == "ip_not_allowed"
    assert await code_after(networks=None, endpoints=["/v1/chat/*"]) == "endpoint_not_allowed"
    assert await code_after(endpoints=None) is None
    soon = int(time.time()) + 2
    assert await code_after(expires_at=soon) is None
    deadline = time.monotonic() + 10
    while (answer := await ask(gateway, made["key"])).status_code == 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert answer.json()["error"]["code"] == "expired_api_key"
    assert time.time() >= soon
    assert await code_after(expires_at=None) is None
    for change, param in [
        ({"expires_at": 1}, "expires_at"),
        ({"networks": ["10.0.0.1/8"]}, "networks[0]"),
        ({"name": None}, "name"),
        ({"tenant_id": "other"}, "tenant_id"),
    ]:
        wrong = await post(gateway, f"keys/{made['id']}", 400, **change)
        assert wrong["error"]["param"] == param
    await post(gateway, "keys/key_of_nobody", 404, name="x")


async def test_a_price_that_is_deleted_costs_no_more(gateway: Gateway) -> None:
    key = (await new_key(gateway, "priced"))["key"]
    path = f"/api/admin/prices/{MODEL}"
    await post(gateway, f"prices/{MODEL}", input="1", cached_input="1", output="1")
    await post(gateway, f"prices/{MODEL}", input="1000", cached_input="1000", output="2000")
    assert (await ask(gateway, key)).status_code == 200
    # 3 x 0.001 + 2 x 0.002, by the second of the two prices.
    assert float((await until_usage(gateway, "priced", 1))["cost"]) == 0.007
    assert (await gateway.http.delete(path, headers=ADMIN)).json() == {"model": MODEL, "deleted": True}
    assert (await ask(gateway, key)).status_code == 200
    assert float((await until_usage(gateway, "priced", 2))["cost"]) == 0.007
    assert (await gateway.http.delete(path, headers=ADMIN)).status_code == 404


async def test_tenants_see_neither_administration_nor_each_other(gateway: Gateway) -> None:
    one, two = await new_key(gateway, "one"), await new_key(gateway, "two")
    request_id = (await ask(gateway, one["key"])).headers["x-request-id"]
    as_one = {"authorization": f"Bearer {one['key']}"}
    as_two = {"authorization": f"Bearer {two['key']}"}
    path = f"/api/requests/{request_id}"
    assert (await gateway.http.get(path, headers=as_one)).status_code == 200
    assert (await gateway.http.get(path, headers=as_two)).status_code == 404
    assert (await gateway.http.get("/api/requests", headers=as_two)).json()["requests"] == []
    for closed in ("/api/admin/keys", "/api/workers", "/api/pool"):
        assert (await gateway.http.get(closed, headers=as_one)).status_code == 403
    assert {submit.namespace for worker in gateway.workers for submit in worker.submits} == {"tenant:one"}


async def test_50_parallel_requests_never_overrun_a_token_limit(gateway: Gateway) -> None:
    key = (await new_key(gateway, "parallel"))["key"]
    await post(gateway, "limits", subject_kind="tenant", subject_id="parallel", tokens_per_minute=1000)

    async def burst() -> list[httpx.Response]:
        answers = [ask(gateway, key, prompt=[5] * 30, max_tokens=20) for _ in range(50)]
        return list(await asyncio.gather(*answers))

    answers = await burst()
    # 30 + 20 = 50 tokens each: exactly 20 of them fit into 1,000.
    assert [answer.status_code for answer in answers].count(200) == 20
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 30
    for answer in refused:
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert (
            0 < int(answer.headers["retry-after-ms"]) <= 3050
        )  # the minute is 3 s in this test, a slot 50 ms
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    assert (await until_usage(gateway, "parallel", 20))["completion_tokens"] == 400
    # A busy machine spreads the burst: some of the 20 may have come in after the last refusal said when to return.
    await asyncio.sleep(3.1)
    assert [answer.status_code for answer in await burst()].count(200) == 20


async def test_a_users_limit_is_one_for_all_of_its_keys_and_nobody_elses(gateway: Gateway) -> None:
    await post(gateway, "tenants", 201, id="people")
    users = [await post(gateway, "tenants/people/users", 201, name=name) for name in ("ada", "bob")]
    ada_1, ada_2, bob = [
        (await post(gateway, "keys", 201, tenant_id="people", name="test", user_id=user["id"]))["key"]
        for user in (users[0], users[0], users[1])
    ]
    await post(gateway, "limits", subject_kind="user", subject_id=users[0]["id"], requests_per_minute=2)
    assert [(await ask(gateway, key)).status_code for key in (ada_1, ada_2)] == [200, 200]
    refused = await ask(gateway, ada_1)
    assert refused.status_code == 429
    assert refused.json()["error"]["message"] == "limit of this user: 2 requests per minute"
    assert [(await ask(gateway, bob)).status_code for _ in range(3)] == [200] * 3


async def test_streamed_tokens_count_against_the_limit(gateway: Gateway) -> None:
    key = (await new_key(gateway, "streaming"))["key"]
    await post(gateway, "limits", subject_kind="tenant", subject_id="streaming", tokens_per_minute=100)
    # 30 + 20 = 50 tokens each: two fit into 100, whether the client asks for the usage or not.
    answers = [await ask(gateway, key, prompt=[5] * 30, max_tokens=20, stream=True) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert all("total_tokens" not in answer.text for answer in answers)
    assert answers[1].headers["x-ratelimit-remaining-tokens"] == "0"
    assert (await until_usage(gateway, "streaming", 2))["completion_tokens"] == 40


async def test_what_was_reserved_and_not_used_is_given_back(gateway: Gateway) -> None:
    key = (await new_key(gateway, "refund"))["key"]
    await post(gateway, "limits", subject_kind="tenant", subject_id="refund", tokens_per_minute=1000)
    # The echo's second token is the stop token: 3 + 2 tokens of the 3 + 600 reserved.
    first = await ask(gateway, key, prompt=[9, 2, 9], max_tokens=600)
    assert first.status_code == 200
    used = first.json()["usage"]["total_tokens"]
    deadline = time.monotonic() + 5
    while (second := await ask(gateway, key, prompt=[9, 2, 9], max_tokens=600)).status_code != 200:
        assert time.monotonic() < deadline, (used, second.text)
        await asyncio.sleep(0.05)
    hopeless = await ask(gateway, key, max_tokens=2000)
    assert hopeless.status_code == 429
    assert hopeless.headers["x-should-retry"] == "false"


async def test_a_budget_ends_service_with_prices(gateway: Gateway) -> None:
    key = (await new_key(gateway, "budget"))["key"]
    await post(gateway, f"prices/{MODEL}", input="1000", cached_input="1000", output="2000")
    # 3 x 0.001 + 2 x 0.002 = 0.007 a request: one fits into 0.01, two do not.
    await post(gateway, "limits", subject_kind="tenant", subject_id="budget", monthly_budget="0.01")
    assert (await ask(gateway, key)).status_code == 200
    spent = await ask(gateway, key)
    assert (spent.status_code, spent.json()["error"]["code"]) == (429, "insufficient_quota")
    assert float((await until_usage(gateway, "budget", 1))["cost"]) == 0.007


async def test_the_admin_api_names_the_field_at_fault(gateway: Gateway) -> None:
    for path, body, param in [
        ("tenants", {"id": "No Good"}, "id"),
        ("keys", {"tenant_id": "nobody", "name": "x"}, "tenant_id"),
        ("keys", {"tenant_id": "default", "name": "x", "networks": ["10.0.0.1/8"]}, "networks[0]"),
        ("limits", {"subject_kind": "tenant", "subject_id": "default", "tokens_per_minute": -1}, "tokens_per_minute"),
    ]:  # fmt: skip
        answer = await gateway.http.post(f"/api/admin/{path}", json=body, headers=ADMIN)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param


async def test_the_ledger_is_what_was_produced_when_clients_vanish(
    served: ServedModel, redis_server: RedisServer
) -> None:
    workers = [EchoWorker("both-0", "both", step_s=0.002)]
    settings = {"redis_url": redis_server.url, "api_keys": "operator-key"}
    chance = random.Random(7)
    async with serving(served, workers, **settings) as gateway:
        key = (await new_key(gateway, "vanishing"))["key"]
        await post(gateway, "limits", subject_kind="tenant", subject_id="vanishing", concurrent_requests=1000,
                   tokens_per_minute=10**9)  # fmt: skip

        async def stream() -> None:
            body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 60, "stream": True}
            headers = {"authorization": f"Bearer {key}"}
            leaves_after = chance.choice([1, 5, 20, 1000])
            async with gateway.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
                number = 0
                async for _ in answer.aiter_lines():
                    number += 1
                    if number > leaves_after:
                        return

        for _ in range(2):
            await asyncio.gather(*(stream() for _ in range(50)))
        row = await until_usage(gateway, "vanishing", 100)
        assert row["completion_tokens"] == workers[0].num_produced
        assert workers[0].num_sequences == 0
        deadline = time.monotonic() + 5
        tenancy = gateway.app.state.tenancy
        while tenancy.quota.num_held or tenancy.ledger.num_pending:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_two_gateways_share_keys_limits_and_the_ledger(
    served: ServedModel, redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = {
        "redis_url": redis_server.url,
        "api_keys": "operator-key",
        "database_url": f"sqlite:///{tmp_path}/shared.db",
        "key_pepper": "the same for both",
    }
    async with (
        serving(served, disaggregated(), **settings) as one,
        serving(served, disaggregated(), **settings) as two,
    ):
        made = await new_key(one, "shared")
        key = made["key"]
        await post(one, "limits", subject_kind="tenant", subject_id="shared", tokens_per_minute=1000)
        await asyncio.sleep(0.5)
        answers = await asyncio.gather(
            *(ask(gateway, key, prompt=[5] * 30, max_tokens=20) for gateway in (one, two) for _ in range(25))
        )
        assert [answer.status_code for answer in answers].count(200) == 20
        assert (await until_usage(two, "shared", 20))["completion_tokens"] == 400
        assert (await usage(one, tenant="shared")) == (await usage(two, tenant="shared"))
        await post(one, f"keys/{made['id']}/revoke")
        deadline = time.monotonic() + 1
        while (await ask(two, key)).status_code != 401:
            assert time.monotonic() < deadline, "the other gateway still takes the key"
            await asyncio.sleep(0.02)
