import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_pool.books import check_namespace
from memory_pool.keys import SHARED_NAMESPACE, block_keys, namespace_at, namespace_of, tail_key


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


def test_lists_and_arrays_of_the_same_tokens_have_the_same_names() -> None:
    tokens = [0, 1, 50_000, 2**32 - 1]
    for array in (np.array(tokens), np.array(tokens, np.uint32)):
        assert block_keys(array, block_tokens=2, fingerprint="m", namespace="n") == keys(tokens)


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


def test_no_two_tenants_share_a_namespace() -> None:
    odd = "org/1"
    # A tenant may call itself what the server makes of another's name.
    twin = namespace_of(odd).removeprefix("tenant-sha256:")
    tenants = [None, "default", "shared", "a", "A", odd, "org/2", "", "..", "x" * 101, twin]
    namespaces = [namespace_of(tenant) for tenant in tenants]
    assert len(set(namespaces)) == len(tenants)
    assert SHARED_NAMESPACE not in namespaces
    assert [check_namespace(name) for name in namespaces] == namespaces


def test_a_salt_parts_the_names_and_shifted_fields_differ() -> None:
    def named(namespace: str, salt: str) -> bytes:
        return block_keys([1, 2], block_tokens=2, fingerprint="m", namespace=namespace, salt=salt)[0]

    assert named("n", "") == keys([1, 2])[0]
    assert len({named("n", ""), named("n", "s"), named("ns", ""), named("", "ns"), named("other", "s")}) == 5


def test_a_shared_prefix_has_one_name_for_all_and_what_follows_does_not() -> None:
    def named(namespace: str, num_shared_blocks: int, salt: str = "") -> list[bytes]:
        return block_keys(
            list(range(8)),
            block_tokens=2,
            fingerprint="m",
            namespace=namespace,
            salt=salt,
            num_shared_blocks=num_shared_blocks,
        )

    a, b = named("a", 2), named("b", 2)
    assert a[:2] == b[:2] == named("a", 2, "salt")[:2] == keys(list(range(4)), namespace=SHARED_NAMESPACE)
    assert not set(a[2:]) & set(b[2:])
    assert not set(a[2:]) & set(named("a", 2, "salt")[2:])
    # The branch is no continuation of the shared chain, nor of the tenant's own.
    assert not set(a) & {*named(SHARED_NAMESPACE, 0)[2:], *named("a", 0)}
    assert [namespace_at(i, namespace="a", num_shared_blocks=2) for i in (0, 1, 2)] == [
        "shared",
        "shared",
        "a",
    ]


def test_a_segment_shares_its_tag_and_long_chains_spread() -> None:
    # Segments: 0-1, then 16 blocks each: 2-17, 18-33, 34-49.
    tags = [key[:4] for key in keys(list(range(100)))]
    assert len(set(tags)) == 4
    assert [tags.index(tag) for tag in dict.fromkeys(tags)] == [0, 2, 18, 34]


def test_tail_names_are_per_request() -> None:
    assert len(tail_key("a", "n")) == 32
    assert tail_key("a", "n") == tail_key("a", "n")
    assert len({tail_key("a", "n"), tail_key("b", "n"), tail_key("a", "m")}) == 3


@pytest.mark.parametrize("tokens", [[-1, 0], [0, 1 << 32]])
def test_a_token_that_is_no_id_is_refused(tokens: list[int]) -> None:
    for ids in (tokens, np.array(tokens)):
        with pytest.raises(ValueError, match="tokens"):
            block_keys(ids, block_tokens=2, fingerprint="m", namespace="n")


def test_a_block_needs_tokens() -> None:
    with pytest.raises(ValueError, match="block_tokens"):
        keys([1], block_tokens=0)
