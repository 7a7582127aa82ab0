import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_pool.block import BlockFormat, Damage
from tests.memory_pool.conftest import FORMAT

KEY = bytes(range(32))
TOKENS = [5, 6, 7]
PAYLOAD = bytes(i % 251 for i in range(FORMAT.payload_bytes))


def verify(
    header: bytes, payload: bytes, *, block_format: BlockFormat = FORMAT, key: bytes = KEY
) -> Damage | None:
    return block_format.verify(key, TOKENS, memoryview(header), memoryview(payload))


def test_what_was_encoded_verifies() -> None:
    header = FORMAT.encode_header(KEY, TOKENS, PAYLOAD)
    assert len(header) == FORMAT.header_bytes(3)
    assert verify(header, PAYLOAD) is None


@given(st.integers(0, FORMAT.value_bytes(3) * 8 - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    value = bytearray(FORMAT.encode_header(KEY, TOKENS, PAYLOAD) + PAYLOAD)
    value[bit // 8] ^= 1 << bit % 8
    cut = FORMAT.header_bytes(3)
    assert verify(bytes(value[:cut]), bytes(value[cut:])) is not None


def test_another_models_layouts_or_keys_block_is_foreign() -> None:
    header = FORMAT.encode_header(KEY, TOKENS, PAYLOAD)
    for change in ({"fingerprint": "model-b"}, {"num_kv_heads": 4}, {"dtype": "int8"}):
        other = dataclasses.replace(FORMAT, **change)
        assert verify(header, PAYLOAD, block_format=other) is Damage.FOREIGN
    assert verify(header, PAYLOAD, key=bytes(32)) is Damage.FOREIGN
    assert FORMAT.verify(KEY, [5, 6, 8], memoryview(header), memoryview(PAYLOAD)) is Damage.FOREIGN


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="payload"):
        FORMAT.encode_header(KEY, TOKENS, PAYLOAD[:-1])
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        FORMAT.encode_header(KEY, [1] * 5, PAYLOAD)
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        FORMAT.encode_header(KEY, [], PAYLOAD)
    with pytest.raises(ValueError, match="32 bytes"):
        FORMAT.encode_header(b"short", TOKENS, PAYLOAD)
