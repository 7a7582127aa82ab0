import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from memory_pool.model_cache import BLOCK_BYTES, ModelCache


@pytest.fixture
def cache(redis_url: str) -> Iterator[ModelCache]:
    with contextlib.closing(ModelCache(redis_url, capacity_bytes=40 << 20)) as made:
        yield made


def model_file(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    path.write_bytes(os.urandom(size))
    return path


def names(cache: ModelCache) -> list[str]:
    return [f"{model.name}@{model.version}" for model in cache.models()]


def test_a_model_comes_back_as_it_was(cache: ModelCache, tmp_path: Path) -> None:
    # Ten blocks and a bit: more than one batch, the last block short.
    path = model_file(tmp_path, "a", 9 * BLOCK_BYTES + 12_345)
    assert cache.publish("a", "v1", path)
    assert cache.publish("a", "v1", path)
    target = tmp_path / "copy"
    assert cache.fetch("a", "v1", target)
    assert target.read_bytes() == path.read_bytes()
    assert not cache.fetch("a", "v2", tmp_path / "none")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "copy"]


def test_models_go_as_a_whole_least_recently_used_first(
    cache: ModelCache, tmp_path: Path, redis_url: str
) -> None:
    sizes = {"a": 16 << 20, "b": 12 << 20, "c": 20 << 20}
    for name in "ab":
        assert cache.publish(name, f"version-{name}", model_file(tmp_path, name, sizes[name]))
    assert cache.fetch("a", "version-a", tmp_path / "copy")
    # 16 + 12 + 20 MiB do not fit 40: b was not used since it came, so it goes.
    assert cache.publish("c", "version-c", model_file(tmp_path, "c", sizes["c"]))
    assert names(cache) == ["c@version-c", "a@version-a"]
    with redis.Redis.from_url(redis_url) as connection:
        left = [connection.ttl(name) for name in connection.scan_iter("cm:b:*")]
    # 4 blocks of a and 5 of c, none with a time to live.
    assert left == [-1] * 9
    assert not cache.publish("d", "v", model_file(tmp_path, "d", 41 << 20))
    assert names(cache) == ["c@version-c", "a@version-a"]


@pytest.mark.parametrize("fault", ["flip", "delete"])
def test_a_damaged_model_is_dropped_and_never_delivered(
    cache: ModelCache, tmp_path: Path, redis_url: str, fault: str
) -> None:
    path = model_file(tmp_path, "a", 3 * BLOCK_BYTES)
    cache.publish("a", "v1", path)
    with redis.Redis.from_url(redis_url) as connection:
        name = sorted(connection.scan_iter("cm:b:*"))[1]
        if fault == "flip":
            connection.setrange(name, 1000, b"x" * 20)
        else:
            connection.delete(name)
    assert not cache.fetch("a", "v1", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert cache.models() == []
    assert cache.publish("a", "v1", path)
    assert cache.fetch("a", "v1", tmp_path / "copy")


def test_a_prefetched_model_is_there_when_wanted(cache: ModelCache, tmp_path: Path) -> None:
    path = model_file(tmp_path, "a", BLOCK_BYTES)
    cache.publish("a", "v1", path)
    assert cache.prefetch("a", "v1", tmp_path / "copy").result(10)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert cache.drop("a", "v1")
    assert not cache.drop("a", "v1")
    assert not cache.prefetch("a", "v1", tmp_path / "copy").result(10)


def test_without_a_pool_there_is_no_model(tmp_path: Path) -> None:
    with contextlib.closing(ModelCache("redis://127.0.0.1:1", capacity_bytes=1 << 20)) as cache:
        assert cache.models() == []
        assert not cache.publish("a", "v1", model_file(tmp_path, "a", 100))
        assert not cache.fetch("a", "v1", tmp_path / "copy")
        assert not cache.drop("a", "v1")
