import contextlib
from pathlib import Path

import pytest

from memory_pool.admin import PoolAdmin
from memory_pool.client import PoolClient
from memory_pool.disk_tier import DiskReader, DiskTier
from memory_pool.keeper import Keeper
from tests.memory_pool.conftest import FORMAT, puts_of, tokens_of

VALUE_BYTES = FORMAT.value_bytes(FORMAT.block_tokens)


def test_an_operator_sees_and_purges_one_namespace(redis_url: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            contextlib.closing(PoolClient(redis_url, FORMAT, disk=DiskReader(tmp_path)))
        )
        keeper = stack.enter_context(contextlib.closing(Keeper(redis_url, disk=DiskTier(tmp_path, 1 << 20))))
        admin = stack.enter_context(contextlib.closing(PoolAdmin(redis_url, disk_folder=tmp_path)))
        mine, other = puts_of(tokens_of(3), "mine"), puts_of(tokens_of(2), "other")
        client.publish(mine)
        client.publish(other)
        keeper.run_pass()
        blocks = admin.inspect("mine")
        assert {block["key"] for block in blocks} == {put.key.hex() for put in mine}
        assert all(
            block["in_dram"] and block["on_disk"] and block["num_bytes"] == VALUE_BYTES for block in blocks
        )
        assert len(admin.inspect("mine", most=1)) == 1
        client.lease([mine[0].key], holder="reader")
        assert {block["key"]: block["holders"] for block in admin.inspect("mine")} == {
            put.key.hex(): int(put is mine[0]) for put in mine
        }
        assert admin.purge("mine") == 2
        assert admin.stats()["namespaces"]["mine"]["used_bytes"] == VALUE_BYTES
        client.release([mine[0].key], holder="reader")
        assert admin.purge("mine") == 1
        assert list(admin.stats()["namespaces"]) == ["other"]
        assert client.lookup([put.key for put in mine], "mine") == 0
        assert client.lookup([put.key for put in other], "other") == 2


def test_a_quota_is_set_and_lifted(redis_url: str) -> None:
    with contextlib.closing(PoolAdmin(redis_url)) as admin:
        admin.set_quota("n", 100)
        assert admin.stats()["namespaces"]["n"]["quota_bytes"] == 100
        admin.set_quota("n", None)
        assert admin.stats()["namespaces"]["n"]["quota_bytes"] is None
        with pytest.raises(ValueError, match="namespace"):
            admin.purge("../x")
