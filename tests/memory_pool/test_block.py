import dataclasses

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from memory_pool.block import TRAILER_BYTES, BlockFormat, Damage, intact
from tests.memory_pool.conftest import FORMAT

KEY = bytes(range(32))
TOKENS = [5, 6, 7]
PAYLOAD = bytes(i % 251 for i in range(FORMAT.payload_bytes))


def encoded() -> bytes:
    return b"".join(FORMAT.encode(KEY, TOKENS, PAYLOAD))


def verify(
    value: bytes, *, block_format: BlockFormat = FORMAT, key: bytes = KEY, tokens: list[int] = TOKENS
) -> Damage | None:
    cut = FORMAT.header_bytes(3)
    header, payload, trailer = value[:cut], value[cut:-TRAILER_BYTES], value[-TRAILER_BYTES:]
    return block_format.verify(key, tokens, memoryview(header), memoryview(payload), memoryview(trailer))


def test_what_was_encoded_verifies() -> None:
    assert len(encoded()) == FORMAT.value_bytes(3)
    assert verify(encoded()) is None
    assert intact(encoded())


@given(st.integers(0, FORMAT.value_bytes(3) * 8 - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    value = bytearray(encoded())
    value[bit // 8] ^= 1 << bit % 8
    assert verify(bytes(value)) is not None


def test_another_models_layouts_or_keys_block_is_foreign() -> None:
    for change in ({"fingerprint": "model-b"}, {"num_kv_heads": 4}, {"dtype": "int8"}):
        other = dataclasses.replace(FORMAT, **change)
        assert verify(encoded(), block_format=other) is Damage.FOREIGN
    assert verify(encoded(), key=bytes(32)) is Damage.FOREIGN
    assert verify(encoded(), tokens=[5, 6, 8]) is Damage.FOREIGN


def test_a_damaged_payload_or_trailer_is_seen_by_those_who_move_blocks_unread() -> None:
    for at in (FORMAT.header_bytes(3), -1):
        value = bytearray(encoded())
        value[at] ^= 1
        assert not intact(bytes(value))
    assert not intact(encoded()[:-1])


def test_a_checksum_computed_on_the_way_is_the_one_that_counts() -> None:
    cut = FORMAT.header_bytes(3)
    views = [memoryview(part) for part in (encoded()[:cut], PAYLOAD, encoded()[-TRAILER_BYTES:])]
    right = xxhash.xxh3_64_intdigest(PAYLOAD)
    assert FORMAT.verify(KEY, TOKENS, *views, right) is None
    assert FORMAT.verify(KEY, TOKENS, *views, right ^ 1) is Damage.CORRUPT


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="payload"):
        FORMAT.encode(KEY, TOKENS, PAYLOAD[:-1])
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        FORMAT.encode(KEY, [1] * 5, PAYLOAD)
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        FORMAT.encode(KEY, [], PAYLOAD)
    with pytest.raises(ValueError, match="32 bytes"):
        FORMAT.encode(b"short", TOKENS, PAYLOAD)
