import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.pool_cli import pool_app
from memory_pool.block import BlockFormat
from memory_pool.client import PoolClient, PutItem
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
    assert len(call("inspect", "tenant", "--most", "2", "--data-dir", data_dir)[1].splitlines()) == 2
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
