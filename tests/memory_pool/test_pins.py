"""Pinned prefixes stay while anything else can go, and no longer than they were pinned."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from memory_pool.client import PoolClient
from memory_pool.disk_tier import DiskTier
from memory_pool.keeper import Keeper
from memory_pool.pins import MAX_PINS, Pins, TooManyPinsError
from memory_pool.redis_store import redis_key
from memory_pool.shared_prefixes import SharedPrefix, SharedPrefixes
from tests.memory_pool.conftest import FORMAT, poll, puts_of, tokens_of

VALUE_BYTES = FORMAT.value_bytes(FORMAT.block_tokens)


@pytest.fixture
def keeper(redis_url: str) -> Iterator[Keeper]:
    with contextlib.closing(Keeper(redis_url)) as made:
        made._books.set_quota("default", 20 * VALUE_BYTES)
        yield made


@pytest.fixture
def client(redis_url: str) -> Iterator[PoolClient]:
    with contextlib.closing(PoolClient(redis_url, FORMAT)) as made:
        yield made


@pytest.fixture
def pins(keeper: Keeper) -> Pins:
    return keeper._pins


def there(url: str, keys: list[bytes]) -> int:
    with redis.Redis.from_url(url) as connection:
        return int(connection.exists(*map(redis_key, keys)))


def test_pinned_blocks_go_last(client: PoolClient, keeper: Keeper, pins: Pins, redis_url: str) -> None:
    old, new = puts_of(tokens_of(8)), puts_of(tokens_of(11, first=500))
    pinned, others = [put.key for put in old], [put.key for put in new]
    client.publish(old)
    pins.pin("default", "p", num_tokens=32, keys=pinned, ttl_s=60)
    client.publish(new)
    # 19 of 20 blocks are over the high mark of 18, so room is made down to 85 %: two go, and not the oldest.
    keeper.run_pass()
    assert (there(redis_url, pinned), there(redis_url, others)) == (8, 9)
    # A quota of 8 blocks leaves room for 6.8: all that is not pinned goes, and then two of the pinned.
    keeper._books.set_quota("default", 8 * VALUE_BYTES)
    keeper.run_pass()
    assert (there(redis_url, pinned), there(redis_url, others)) == (6, 0)
    assert keeper._books.imbalance("default") == 0


def test_a_reader_holds_what_a_pin_does_not(
    client: PoolClient, keeper: Keeper, pins: Pins, redis_url: str
) -> None:
    puts = puts_of(tokens_of(4))
    keys = [put.key for put in puts]
    client.publish(puts)
    pins.pin("default", "p", num_tokens=16, keys=keys, ttl_s=60)
    client.lease(keys[:2], holder="reader")
    keeper._books.set_quota("default", 0)
    keeper.run_pass()
    assert there(redis_url, keys[:2]) == 2
    assert there(redis_url, keys) == 2


@pytest.mark.parametrize("how", ["unpinned", "over"])
def test_a_pin_ends(client: PoolClient, keeper: Keeper, pins: Pins, redis_url: str, how: str) -> None:
    puts = puts_of(tokens_of(2))
    client.publish(puts)
    names = [redis_key(put.key) for put in puts]
    pins.pin(
        "default", "p", num_tokens=8, keys=[p.key for p in puts], ttl_s=60 if how == "unpinned" else 0.05
    )
    with redis.Redis.from_url(redis_url) as connection:
        if how == "unpinned":
            keeper.run_pass()
            assert [connection.ttl(name) for name in names] == [-1, -1]
            assert pins.unpin("default", "p")
            assert not pins.unpin("default", "p")
            keeper.run_pass()
        else:

            def is_over() -> bool:
                keeper._pin_again_at = 0.0
                keeper.run_pass()
                keeper.audit()
                return not pins.all()

            poll(is_over)
            keeper.audit()
        # Redis may evict them again.
        assert all(connection.ttl(name) > 0 for name in names)


def test_what_comes_later_is_held_too(client: PoolClient, keeper: Keeper, pins: Pins, redis_url: str) -> None:
    puts = puts_of(tokens_of(2))
    pins.pin("default", "p", num_tokens=8, keys=[put.key for put in puts], ttl_s=60)
    keeper.run_pass()
    client.publish(puts)
    keeper._pin_again_at = 0.0  # the next renewal
    keeper.run_pass()
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.ttl(redis_key(puts[0].key)) == -1


def test_pins_of_a_namespace_are_bounded(pins: Pins) -> None:
    for number in range(MAX_PINS):
        pins.pin("default", f"p{number}", num_tokens=4, keys=[bytes(32)], ttl_s=60)
    with pytest.raises(TooManyPinsError, match="100 pins"):
        pins.pin("default", "more", num_tokens=4, keys=[bytes(32)], ttl_s=60)
    pins.pin("default", "p0", num_tokens=4, keys=[bytes(32)], ttl_s=60)  # replaces its own
    pins.pin("other", "p0", num_tokens=4, keys=[bytes(32)], ttl_s=60)
    assert len(pins.all()) == MAX_PINS + 1


def test_decisions_outlive_a_redis_that_came_up_empty(redis_url: str, tmp_path: Path) -> None:
    prefix = SharedPrefix.of(tokens_of(3), block_tokens=FORMAT.block_tokens, fingerprint=FORMAT.fingerprint)
    with contextlib.closing(Keeper(redis_url, disk=DiskTier(tmp_path, 1 << 20))) as keeper:
        made = keeper._pins.pin("default", "p", num_tokens=8, keys=[bytes(32)], ttl_s=600)
        SharedPrefixes(keeper._connection).share("all", prefix)
        keeper._books.set_quota("default", 12345)
        keeper.run_pass()
        with redis.Redis.from_url(redis_url) as connection:
            connection.flushall()
        keeper.run_pass()
        assert keeper._pins.all() == [made]
        assert SharedPrefixes(keeper._connection).all() == {"all": prefix}
        assert keeper._books.usage("default") == (0, 12345)
