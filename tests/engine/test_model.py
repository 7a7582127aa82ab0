"""The step against the float32 reference, and against itself: any batch, chunking, path and number of threads."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.kernels import available
from engine.kernels.measure import random_tensor
from engine.kv_cache import KVCache
from engine.model import Model, StepBatch
from engine.reference import ReferenceModel
from engine.weights import ModelWeights
from engine.weights.tensor import Tensor

F32 = NDArray[np.float32]
BLOCKS = 24


def weights(
    kind: str = "q4_1",
    *,
    hidden: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    tied: bool = True,
) -> ModelWeights:
    """A random Llama of 2 layers; the vocabulary, 203, is no multiple of 16."""
    config = ModelConfig(
        name="tiny", num_layers=2, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=160, vocab_size=203, max_context_tokens=256, rms_norm_eps=1e-5, rope_theta=10000.0,
        tied_embeddings=tied, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}

    def add(name: str, rows: int, cols: int) -> None:
        if kind == "f32":
            values = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
            tensors[name] = Tensor(name, "f32", (rows, cols), values.reshape(-1).view(np.uint8))
        else:
            made = random_tensor(kind, rows, cols, seed=len(tensors))
            tensors[name] = Tensor(name, kind, made.shape, made.data)

    def norm(name: str) -> None:
        values = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)
        tensors[name] = Tensor(name, "f32", (hidden,), values.view(np.uint8))

    add("token_embd", 203, hidden)
    norm("output_norm")
    if not tied:
        add("output", 203, hidden)
    for layer in range(2):
        name = f"blk.{layer}."
        for part in ("attn_norm", "ffn_norm"):
            norm(name + part)
        add(name + "attn_q", heads * head_dim, hidden)
        add(name + "attn_k", kv_heads * head_dim, hidden)
        add(name + "attn_v", kv_heads * head_dim, hidden)
        add(name + "attn_output", hidden, heads * head_dim)
        for part in ("ffn_gate", "ffn_up"):
            add(name + part, 160, hidden)
        add(name + "ffn_down", hidden, 160)
    return ModelWeights(config, tensors, "0" * 64)


def step(
    model: Model,
    cache: KVCache,
    rows: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    wanted: Sequence[int],
) -> F32:
    """Rows of sequences, each (tokens, first position, block ids), as one step; a copy of the wanted logits."""
    starts = np.cumsum([0, *(len(tokens) for tokens, _, _ in rows)])
    width = max(len(table) for _, _, table in rows)
    tables = [[*table, *[0] * (width - len(table))] for _, _, table in rows]
    parts = (
        [t for tokens, _, _ in rows for t in tokens],
        starts,
        [first for _, first, _ in rows],
        tables,
        wanted,
    )
    return model.forward(StepBatch(*(np.asarray(part, np.int32) for part in parts)), cache).copy()


def alone(model: Model, tokens: Sequence[int]) -> F32:
    """Logits of every token of one sequence in one step."""
    return step(model, model.new_cache(BLOCKS), [(tokens, 0, range(8))], range(len(tokens)))


def tokens_of(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, 203, count).tolist()
    return drawn


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    made = Model(weights(), num_threads=2)
    yield made
    made.close()


@pytest.mark.parametrize(
    "made",
    [
        weights(kind="q4_1"),
        weights(kind="q4_0", heads=3, kv_heads=3, head_dim=32),
        weights(kind="q8_0", heads=3, kv_heads=1, head_dim=128, tied=False),
        weights(kind="f32", heads=6, kv_heads=2, hidden=192),
    ],
    ids=["q4_1", "q4_0 MHA", "q8_0 head_dim 128", "f32"],
)
def test_logits_are_those_of_the_reference(made: ModelWeights) -> None:
    served = Model(made, num_threads=2)
    tokens = tokens_of(1, 75)
    expected, got = ReferenceModel(made).forward(tokens), alone(served, tokens)
    served.close()
    error = np.sqrt(np.mean((got - expected) ** 2)) / np.std(expected)
    # 8-bit keys and values: steps of 1/127 of their largest, about 2.7 deviations of 128 dims: 2.7 / 127 / sqrt(12) =
    # 0.6 % a product; queries of 1/127 of their largest two neighbours, about 4.2 deviations: 1 %. 8-bit weights for
    # f32 add about 1 %, and so do 8-bit activations for 4-bit weights: steps of 4 to 8 times 1/127 of a mean, 0.9 to
    # 1.8 % a product. Errors of a layer's products join those before.
    assert error < 0.045


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 69), max_size=5), others=st.lists(st.integers(1, 40), max_size=3))
def test_any_chunking_beside_any_company_gives_the_same_bits(
    model: Model, cuts: list[int], others: list[int]
) -> None:
    tokens = tokens_of(2, 70)
    expected = alone(model, tokens)
    cache = model.new_cache(BLOCKS)
    table = [5, 2, 9]
    for first, last in pairwise(sorted({0, 70, *cuts})):
        company = [(tokens_of(3 + i, count), 0, (10 + 2 * i, 11 + 2 * i)) for i, count in enumerate(others)]
        before = sum(len(rows) for rows, _, _ in company)
        got = step(
            model, cache, [*company, (tokens[first:last], first, table)], range(before, before + last - first)
        )
        assert got.tobytes() == expected[first:last].tobytes()


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_every_path_and_number_of_threads_gives_the_same_bits(
    path: str, num_threads: int, kind: str, expected_bits: dict[str, bytes]
) -> None:
    other = Model(weights(kind), num_threads=num_threads, kernels=path)
    got = alone(other, tokens_of(2, 70))
    other.close()
    assert expected_bits.setdefault(kind, got.tobytes()) == got.tobytes()


@pytest.fixture(scope="module")
def expected_bits() -> dict[str, bytes]:
    return {}


def test_only_wanted_rows_have_logits_and_a_step_may_want_none(model: Model) -> None:
    tokens, cache = tokens_of(4, 40), model.new_cache(BLOCKS)
    assert step(model, cache, [(tokens[:30], 0, (0, 1))], []).shape == (0, 203)
    got = step(model, cache, [(tokens[30:], 30, (0, 1))], [9, 2])
    assert got.tobytes() == alone(model, tokens)[[39, 32]].tobytes()


def test_a_token_without_numbers_has_none_as_logits_and_spoils_no_other_sequence() -> None:
    made = weights("q8_0", tied=False)
    embedding = made.tensors["token_embd"]
    blocks = embedding.data.reshape(203, -1, 34)
    blocks[7, :, :2] = np.array([np.inf], np.float16).view(np.uint8)
    model = Model(made, num_threads=2)
    try:
        good, bad = [token for token in tokens_of(5, 20) if token != 7], [3, 4, 7, 5]
        rows = [(bad, 0, (0,)), (good, 0, (1,))]
        got = step(model, model.new_cache(BLOCKS), rows, range(len(bad) + len(good)))
        assert np.isnan(got[2]).all()
        assert got[:2].tobytes() == alone(model, bad[:2]).tobytes()
        assert got[4:].tobytes() == alone(model, good).tobytes()
    finally:
        model.close()


def test_a_block_of_the_cache_is_the_whole_kv_of_its_tokens(model: Model) -> None:
    """A block copied to another cache serves a continuation there with the same bits."""
    tokens, here, there = tokens_of(5, 50), model.new_cache(4), model.new_cache(4)
    step(model, here, [(tokens[:49], 0, (1, 3))], [])
    there.block(0)[:], there.block(2)[:] = here.block(1), here.block(3)
    got = step(model, there, [(tokens[49:], 49, (0, 2))], [0])
    assert got.tobytes() == alone(model, tokens)[49:].tobytes()


def test_what_lay_in_a_block_before_does_not_matter(model: Model) -> None:
    tokens, cache = tokens_of(6, 5), model.new_cache(2)
    cache.blocks[:] = 0xFF  # half floats of all ones are not numbers
    got = step(model, cache, [(tokens, 0, (1,))], range(5))
    assert got.tobytes() == alone(model, tokens)[:5].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [203]}, "tokens: ids outside 0..202"),
        ({"first_position": [256]}, "first_position: rows beyond the context of 256"),
        ({"first_position": [32]}, "block_tables: 1 blocks a sequence"),
        ({"block_tables": [[9]]}, "block_tables: sequence 0 names a block outside 0..3"),
        ({"logit_rows": [1]}, "logit_rows: outside 0..0"),
        ({"query_start": [0, 2]}, "query_start"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_field(
    model: Model, change: dict[str, list[int]], message: str
) -> None:
    parts = {
        "tokens": [1],
        "query_start": [0, 1],
        "first_position": [0],
        "block_tables": [[0]],
        "logit_rows": [0],
    }
    arrays = {name: np.asarray(value, np.int32) for name, value in (parts | change).items()}
    with pytest.raises(ValueError, match=message):
        model.forward(StepBatch(**arrays), model.new_cache(4))


def test_shapes_the_kernels_do_not_serve_are_named() -> None:
    with pytest.raises(ValueError, match="hidden_size: 80, must be a multiple of 32"):
        Model(weights(hidden=80), num_threads=1)
    with pytest.raises(ValueError, match="num_threads: 0"):
        Model(weights(), num_threads=0)


def test_weights_in_memory_are_as_large_as_shipped(model: Model) -> None:
    matrices = [tensor for tensor in weights().tensors.values() if len(tensor.shape) == 2]
    # The vocabulary is padded from 203 to 208 rows of 3 blocks of 20 bytes; each row has a scale of 4 bytes more.
    num_rows = sum(tensor.shape[0] for tensor in matrices) + 5
    assert model.weight_bytes == sum(tensor.num_bytes for tensor in matrices) + 5 * 3 * 20 + 4 * num_rows
