"""`cloudmatrix keys`, `tenants`, `users`, `prices` and `usage`: what they change holds on a running gateway at once."""

import asyncio
import csv
import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.requests.served import ServedModel
from memory_pool.redis_server import RedisServer
from tests.app.conftest import MODEL, Gateway, disaggregated, serving


def call(*words: str) -> Result:
    return CliRunner().invoke(app, words)


async def ask(gateway: Gateway, key: str) -> tuple[int, str | None]:
    body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2}
    answer = await gateway.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    return answer.status_code, None if answer.is_success else answer.json()["error"]["code"]


async def becomes(gateway: Gateway, key: str, wanted: tuple[int, str | None]) -> None:
    # Far less than the 5 s for which a gateway believes its database without a word of a change.
    deadline = time.monotonic() + 1
    while (found := await ask(gateway, key)) != wanted:
        assert time.monotonic() < deadline, f"still {found}, not {wanted}"
        await asyncio.sleep(0.02)


async def test_what_commands_change_holds_on_a_running_gateway(
    served: ServedModel, redis_server: RedisServer, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/commands.db"
    where = ["--database", database, "--pepper", "p", "--data-dir", str(tmp_path)]

    async def run(*words: str) -> str:
        told = ["--redis", redis_server.url] if words[1] != "list" and words[0] != "usage" else []
        result = await asyncio.to_thread(call, *words, *where, *told)
        assert result.exit_code == 0, result.output
        return result.output.strip()

    settings = {"redis_url": redis_server.url, "api_keys": "operator-key", "database_url": database}
    async with serving(served, disaggregated(), **settings, key_pepper="p") as gateway:
        assert json.loads(await run("tenants", "create", "acme", "--weight", "2"))["weight"] == 2
        key = await run("keys", "create", "--tenant", "acme", "--name", "first")
        assert await ask(gateway, key) == (200, None)
        (listed,) = json.loads(await run("keys", "list", "--tenant", "acme"))["keys"]
        assert listed["name"] == "first"
        assert key not in str(listed)

        await run("keys", "change", listed["id"], "--models", "another")
        await becomes(gateway, key, (403, "model_not_allowed"))
        await run("keys", "change", listed["id"], "--models", "", "--networks", "10.0.0.0/8")
        await becomes(gateway, key, (403, "ip_not_allowed"))
        await run("keys", "change", listed["id"], "--networks", "")
        await becomes(gateway, key, (200, None))
        await run("tenants", "change", "acme", "--suspend")
        await becomes(gateway, key, (403, "tenant_suspended"))
        await run("tenants", "change", "acme", "--resume")
        await becomes(gateway, key, (200, None))
        # A request holds 3 + 2 tokens, more than the limit: waiting cannot help.
        await run("tenants", "limit", "acme", "--tokens-per-minute", "4")
        await becomes(gateway, key, (429, "request_exceeds_limit"))
        tenants = {row["id"]: row for row in json.loads(await run("tenants", "list", "--json"))["tenants"]}
        assert [limit["tokens_per_minute"] for limit in tenants["acme"]["limits"]] == [4]
        await run("tenants", "limit", "acme")
        await becomes(gateway, key, (200, None))
        await run("keys", "revoke", listed["id"])
        await becomes(gateway, key, (401, "revoked_api_key"))

    # Prompts of 3 tokens, answers of 2; requests made before a change had arrived were served, too.
    table = await run("usage", "--tenant", "acme", "--by", "tenant", "--csv")
    (line,) = csv.DictReader(table.splitlines())
    num_served = int(line["requests"])
    assert num_served >= 4
    assert line == {
        "tenant": "acme",
        "requests": str(num_served),
        "prompt_tokens": str(3 * num_served),
        "cached_tokens": "0",
        "completion_tokens": str(2 * num_served),
        "cost": "0",
    }
    (row,) = json.loads(await run("usage", "--by", "", "--since", "2020-01-01", "--json"))["usage"]
    assert row["completion_tokens"] == 2 * num_served
    (row,) = json.loads(await run("usage", "--by", "", "--until", "2020-01-01", "--json"))["usage"]
    assert row["requests"] == 0


async def test_users_and_prices_that_commands_make_hold_on_a_running_gateway(
    served: ServedModel, redis_server: RedisServer, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/commands.db"
    where = ["--database", database, "--pepper", "p", "--data-dir", str(tmp_path)]

    async def run(*words: str) -> str:
        told = ["--redis", redis_server.url] if words[1] != "list" and words[0] != "usage" else []
        result = await asyncio.to_thread(call, *words, *where, *told)
        assert result.exit_code == 0, result.output
        return result.output.strip()

    settings = {"redis_url": redis_server.url, "api_keys": "operator-key", "database_url": database}
    async with serving(served, disaggregated(), **settings, key_pepper="p") as gateway:
        await run("tenants", "create", "acme")
        user = json.loads(await run("users", "create", "Ada", "--tenant", "acme", "--email", "a@b.example"))
        (listed,) = json.loads(await run("users", "list", "--tenant", "acme", "--json"))["users"]
        assert listed == user
        assert user["name"] == "Ada"
        assert "a@b.example" in await run("users", "list")
        key = await run("keys", "create", "--tenant", "acme", "--user", user["id"])
        await run("users", "change", user["id"], "--suspend")
        await becomes(gateway, key, (403, "user_suspended"))
        await run("users", "change", user["id"], "--resume", "--name", "Grace")
        await becomes(gateway, key, (200, None))

        await run("prices", "set", MODEL, "--input", "1000", "--output", "2000.5")
        prices = json.loads(await run("prices", "list", "--json"))["prices"]
        assert prices == {MODEL: {"input": "1000", "cached_input": "1000", "output": "2000.5"}}
        assert "2000.5" in await run("prices", "list")
        # Nothing may be spent and a request now costs 3 x 0.001 + 2 x 0.0020005.
        await run("tenants", "limit", "acme", "--monthly-budget", "0.001")
        await becomes(gateway, key, (429, "insufficient_quota"))
        await run("prices", "delete", MODEL)
        await becomes(gateway, key, (200, None))
        assert json.loads(await run("prices", "list", "--json"))["prices"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prices", "set", "m", "--input", "much", "--output", "1"], "expected an amount"),
        (["prices", "delete", "m"], "there is no price of"),
        (["users", "create", "Ada", "--tenant", "nobody"], "there is no tenant"),
        (["users", "list", "--tenant", "nobody"], "there is no tenant"),
        (["users", "change", "usr_nobody", "--suspend"], "there is no user"),
        (["keys", "revoke", "key_of_nobody"], "there is no key"),
        (["tenants", "create", "No Good"], "id: up to 63"),
        (["tenants", "limit", "default", "--monthly-budget", "lots"], "expected an amount"),
        (["keys", "create", "--networks", "10.0.0.1/8"], "networks[0]"),
        (["usage", "--by", "hour"], "is none of"),
        (["usage", "--database", "mysql://x/y"], "not supported"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    result = call(*words, "--data-dir", str(tmp_path))
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_redis_that_is_away_does_not_undo_a_change(tmp_path: Path) -> None:
    result = call("keys", "create", "--data-dir", str(tmp_path), "--redis", "redis://127.0.0.1:1/0")
    assert result.exit_code == 0
    assert "within 5 s" in result.output


def test_another_pepper_makes_no_keys(tmp_path: Path) -> None:
    where = ["--data-dir", str(tmp_path)]
    assert call("keys", "create", *where, "--pepper", "one").exit_code == 0
    refused = call("keys", "create", *where, "--pepper", "two")
    assert refused.exit_code == 2
    assert "another pepper" in refused.output
