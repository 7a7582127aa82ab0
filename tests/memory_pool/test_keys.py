import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_pool.keys import block_keys, namespace_of, tail_key


def keys(
    tokens: list[int], fingerprint: str = "m", namespace: str = "n", block_tokens: int = 2
) -> list[bytes]:
    return block_keys(tokens, block_tokens=block_tokens, fingerprint=fingerprint, namespace=namespace)


def test_a_name_is_the_documented_chain() -> None:
    def prefixed(*fields: bytes) -> bytes:
        return b"".join(len(f).to_bytes(8, "little") + f for f in fields)

    root = hashlib.sha256(prefixed(b"cloudmatrix-kv-1", b"m", b"n")).digest()
    first = hashlib.sha256(root + bytes([1, 0, 0, 0, 0, 1, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([3, 0, 0, 0, 4, 0, 0, 0])).digest()
    # Both blocks are in the first segment, so both carry the first block's tag (4 bytes).
    assert keys([1, 256, 3, 4]) == [first, first[:4] + second[4:]]


@given(st.lists(st.integers(0, 50_000), max_size=80), st.lists(st.integers(0, 50_000), max_size=80))
def test_names_are_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int]) -> None:
    common = 0
    for x, y in zip(zip(a[::2], a[1::2], strict=False), zip(b[::2], b[1::2], strict=False), strict=False):
        if x != y:
            break
        common += 1
    keys_a, keys_b = keys(a), keys(b)
    assert keys_a[:common] == keys_b[:common]
    assert not set(keys_a[common:]) & set(keys_b[common:])


def test_a_partly_filled_block_has_no_name() -> None:
    assert len(keys(list(range(7)))) == 3
    assert keys([1]) == []


def test_model_namespace_and_block_size_part_the_names() -> None:
    tokens = list(range(8))
    variants = [
        keys(tokens),
        keys(tokens, fingerprint="other"),
        keys(tokens, namespace="other"),
        keys(tokens, fingerprint="mn", namespace=""),
    ]
    assert len({key for variant in variants for key in variant}) == 16


def test_namespaces_of_shifted_fields_differ() -> None:
    assert namespace_of("org_1", "2345") != namespace_of("org_12345", "")
    assert namespace_of("a") != namespace_of("a", "")
    assert namespace_of("org_1", "2345") == namespace_of("org_1", "2345")


def test_a_segment_shares_its_tag_and_long_chains_spread() -> None:
    # Segments: 0-1, then 16 blocks each: 2-17, 18-33, 34-49.
    tags = [key[:4] for key in keys(list(range(100)))]
    assert len(set(tags)) == 4
    assert [tags.index(tag) for tag in dict.fromkeys(tags)] == [0, 2, 18, 34]


def test_tail_names_are_per_request() -> None:
    assert len(tail_key("a")) == 32
    assert tail_key("a") == tail_key("a") != tail_key("b")


@pytest.mark.parametrize("tokens", [[-1, 0], [0, 1 << 32]])
def test_a_token_that_is_no_id_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        keys(tokens)


def test_a_block_needs_tokens() -> None:
    with pytest.raises(ValueError, match="block_tokens"):
        keys([1], block_tokens=0)
