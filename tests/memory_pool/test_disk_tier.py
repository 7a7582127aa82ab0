import os
from pathlib import Path

import pytest

from memory_pool.disk_tier import DiskReader, DiskTier


def key(number: int) -> bytes:
    return bytes([number]) * 32


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1000)
    assert tier.write("n", key(1), b"head" + b"payload")
    head, rest = bytearray(4), bytearray(7)
    reader = DiskReader(tmp_path)
    assert reader.read_into("n", key(1), [memoryview(head), memoryview(rest)]) == 11
    assert bytes(head + rest) == b"headpayload"
    assert reader.read_into("n", key(1), [memoryview(head)]) == 11
    assert reader.read_into("n", key(2), [memoryview(head)]) is None
    assert reader.read_into("other", key(1), [memoryview(head)]) is None
    assert reader.contains("n", key(1))
    assert not reader.contains("other", key(1))


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 30)
    for number in (1, 2, 3):
        tier.write("n", key(number), b"0123456789")
        os.utime(tier.path("n", key(number)), (number, number))
    tier = DiskTier(tmp_path, 30)
    # Another process reads 1: it is now the youngest, so 2 goes.
    DiskReader(tmp_path).read_into("n", key(1), [memoryview(bytearray(10))])
    assert tier.write("n", key(4), b"0123456789")
    assert [tier.contains("n", key(number)) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert (tier.used_bytes, len(tier), tier.num_evicted) == (30, 3, 1)


def test_it_takes_over_what_an_earlier_one_left(tmp_path: Path) -> None:
    DiskTier(tmp_path, 100).write("n", key(1), b"0123456789")
    partial = DiskReader(tmp_path).path("n", key(1)).with_suffix(".partial")
    partial.write_bytes(b"half")
    tier = DiskTier(tmp_path, 100)
    assert (tier.used_bytes, len(tier)) == (10, 1)
    assert not partial.exists()
    assert len(DiskTier(tmp_path, 5)) == 0
    assert not tier.contains("n", key(1))


def test_a_value_larger_than_the_tier_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 5)
    assert not tier.write("n", key(1), b"0123456789")
    assert tier.used_bytes == 0


def test_a_disk_that_takes_nothing_is_a_counted_failure(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("a file where the folder should be")
    tier = DiskTier(tmp_path, 100)
    assert not tier.write("n", key(1), b"x")
    assert (tier.num_failures, tier.used_bytes, len(tier)) == (1, 0, 0)
    assert tier.read("n", key(1)) is None
    tier.delete("n", key(1))


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    # The value can be written aside but not renamed onto a folder.
    tier.path("n", key(1)).mkdir(parents=True)
    assert not tier.write("n", key(1), b"x")
    assert [path.name for path in tier.path("n", key(1)).parent.iterdir()] == [key(1).hex()]


def test_a_namespace_is_purged_alone(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    tier.write("a", key(1), b"x")
    tier.write("b", key(1), b"x")
    assert DiskReader(tmp_path).delete_all("a") == 1
    assert (tier.contains("a", key(1)), tier.contains("b", key(1))) == (False, True)
    tier.refresh()
    assert (len(tier), tier.used_bytes) == (1, 1)


def test_a_disk_that_others_filled_gives_up_its_oldest_for_the_newest(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    tier.write("n", key(1), b"old")
    # What is written aside here goes to a device that is always full.
    aside = tier.path("n", key(2)).with_suffix(".partial")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.symlink_to("/dev/full")
    # The failed try takes the link away, so the second one finds room.
    assert tier.write("n", key(2), b"new")
    assert (tier.read("n", key(1)), tier.read("n", key(2))) == (None, b"new")
    assert (tier.num_evicted, tier.num_failures, tier.used_bytes) == (1, 0, 3)


def test_a_folder_that_was_away_is_counted_again(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "kv", 100)
    tier.write("n", key(1), b"four")
    tier.refresh()
    (tmp_path / "kv").rename(tmp_path / "away")
    tier.refresh()
    assert (len(tier), tier.used_bytes) == (0, 0)
    (tmp_path / "away").rename(tmp_path / "kv")
    tier.refresh()
    assert (len(tier), tier.used_bytes) == (1, 4)


def test_a_namespace_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="namespace"):
        DiskReader(tmp_path).path("..", key(1))
