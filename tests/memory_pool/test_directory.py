import pytest

from memory_pool.directory import AsyncDirectory, Directory, DirectoryError
from tests.memory_pool.conftest import poll


def test_members_come_and_go(redis_url: str) -> None:
    directory = Directory(redis_url)
    directory.announce("a", b"\x00record a", 60.0)
    directory.announce("b", b"record b", 60.0)
    directory.announce("a", b"newer", 60.0)
    assert directory.members() == {"a": b"newer", "b": b"record b"}
    directory.withdraw("a")
    assert directory.members() == {"b": b"record b"}


def test_a_silent_member_vanishes(redis_url: str) -> None:
    directory = Directory(redis_url)
    directory.announce("quiet", b"1", 0.05)
    directory.announce("loud", b"2", 60.0)
    poll(lambda: directory.members() == {"loud": b"2"})


def test_groups_are_apart(redis_url: str) -> None:
    Directory(redis_url, group="one").announce("a", b"1", 60.0)
    assert Directory(redis_url, group="two").members() == {}


async def test_the_event_loop_sees_the_same(redis_url: str) -> None:
    directory = AsyncDirectory(redis_url)
    Directory(redis_url).announce("a", b"1", 60.0)
    await directory.announce("b", b"2", 60.0)
    assert await directory.members() == {"a": b"1", "b": b"2"}
    await directory.withdraw("a")
    assert await directory.members() == {"b": b"2"}
    await directory.close()


async def test_an_outage_is_told() -> None:
    with pytest.raises(DirectoryError):
        Directory("redis://127.0.0.1:1/0").members()
    directory = AsyncDirectory("redis://127.0.0.1:1/0")
    with pytest.raises(DirectoryError):
        await directory.members()
    await directory.close()
