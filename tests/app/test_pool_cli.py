import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from app.pool_cli import pool_app
from app.requests.served import ServedModel
from engine.protocol import Location, WorkerRecord
from memory_pool.block import BlockFormat
from memory_pool.client import PoolClient, PutItem
from memory_pool.directory import Directory
from memory_pool.redis_server import start_redis

FORMAT = BlockFormat(
    fingerprint="m", num_layers=1, num_kv_heads=1, head_dim=1, block_tokens=1, payload_bytes=100
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    server = start_redis(folder / "redis", maxmemory_bytes=64 << 20)
    with contextlib.closing(PoolClient(server.url, FORMAT)) as client:
        payload = memoryview(bytes(100))
        client.publish([PutItem(bytes([number]) * 32, [1], payload, None, "tenant") for number in range(3)])
    yield folder
    server.stop()


def call(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(pool_app, [str(word) for word in words])
    return result.exit_code, result.output


def test_an_operator_sees_limits_and_purges(data_dir: Path) -> None:
    status, output = call("stats", "--data-dir", data_dir, "--json")
    assert (status, json.loads(output)["namespaces"]["tenant"]["blocks"]) == (0, 3)
    assert "tenant" in call("stats", "--data-dir", data_dir)[1]
    assert len(json.loads(call("inspect", "tenant", "--data-dir", data_dir, "--json")[1])["blocks"]) == 3
    listed = call("inspect", "tenant", "--most", "2", "--data-dir", data_dir)[1]
    assert len([line for line in listed.splitlines() if "DRAM" in line and "stored" in line]) == 2
    assert (bytes([0]) * 32).hex() in call("inspect", "tenant", "--data-dir", data_dir)[1]
    call("quota", "tenant", "5000", "--data-dir", data_dir)
    assert (
        json.loads(call("stats", "--data-dir", data_dir, "--json")[1])["namespaces"]["tenant"]["quota_bytes"]
        == 5000
    )
    assert "no quota" in call("quota", "tenant", "--data-dir", data_dir)[1]
    assert json.loads(call("purge", "tenant", "--data-dir", data_dir, "--json")[1])["removed"] == 3


def test_errors_say_what_to_do(data_dir: Path, tmp_path: Path) -> None:
    status, output = call("stats", "--data-dir", tmp_path)
    assert (status, "--redis URL" in output) == (2, True)
    status, output = call("purge", "../x", "--data-dir", data_dir)
    assert (status, "namespace must be" in output) == (2, True)
    assert call("stats", "--redis", "redis://127.0.0.1:1")[0] == 1
    status, output = call("stats", "--redis", "http://:topsecret@x")
    assert (status, "topsecret" in output) == (2, False)


SYSTEM = "You are the clerk of a small harbour. " + "Be brief, be exact, be kind. " * 20


@pytest.fixture
def worker(data_dir: Path, served: ServedModel) -> Iterator[None]:
    """A worker of the served model is alive, as far as the directory knows."""
    record = WorkerRecord(
        id="w",
        role="both",
        state="ready",
        model=served.id,
        fingerprint="f",
        pid=1,
        url="http://127.0.0.1:1",
        location=Location(node=0, npu=0, die=0),
        block_tokens=32,
        kv_bytes_per_token=1,
        max_context_tokens=2048,
        running=0,
        waiting=0,
        queued_tokens=0,
        kv_blocks_used=0,
        kv_blocks_total=1,
    )
    with contextlib.closing(Directory((data_dir / "redis" / "url").read_text())) as directory:
        directory.announce("w", msgspec.msgpack.encode(record), 60)
        yield
        directory.withdraw("w")


@pytest.mark.usefixtures("worker")
def test_prefixes_are_shared_and_pinned(data_dir: Path, tmp_path: Path) -> None:
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "system", "content": SYSTEM}]))
    status, output = call("share", "harbour", "--system", SYSTEM, "--data-dir", data_dir, "--json")
    assert status == 0, output
    made = json.loads(output)
    assert made["num_blocks"] == made["num_tokens"] // 32 > 3
    (listed,) = json.loads(call("shared", "--data-dir", data_dir, "--json")[1])["shared"]
    assert (listed["name"], listed["num_blocks"], listed["fingerprint"]) == (
        "harbour",
        made["num_blocks"],
        "f",
    )
    status, output = call(
        "pin", "h", "--messages", messages, "--tenant", "one", "--data-dir", data_dir, "--json"
    )
    assert status == 0, output
    pinned = json.loads(output)
    assert (pinned["namespace"], pinned["num_blocks"]) == ("tenant:one", made["num_blocks"])
    assert "tenant:one" in call("pins", "--data-dir", data_dir)[1]
    assert call("unpin", "h", "--data-dir", data_dir)[0] == 2  # that of callers without a tenant
    assert call("unpin", "h", "--tenant", "one", "--data-dir", data_dir)[0] == 0
    assert call("pins", "--data-dir", data_dir)[1] == "none\n"
    assert call("unshare", "harbour", "--data-dir", data_dir)[0] == 0
    assert call("unshare", "harbour", "--data-dir", data_dir)[0] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("x", "--text", "short"), "at least one block of 32 tokens"),
        (("x",), "give the prefix by one of"),
        (("x", "--text", "a", "--system", "b"), "give the prefix by one of"),
        (("no good", "--system", SYSTEM), "NAME must be"),
        (("x", "--messages", "/nowhere.json"), "/nowhere.json"),
        (("x", "--system", SYSTEM, "--model", "other"), "no worker of other is ready"),
    ],
)
@pytest.mark.usefixtures("worker")
def test_a_bad_prefix_is_refused_by_name(data_dir: Path, words: tuple[str, ...], says: str) -> None:
    status, output = call("share", *words, "--data-dir", data_dir)
    assert (status, says in output) == (2, True), output
