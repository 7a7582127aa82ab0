from pathlib import Path

import numpy as np

from engine.reference import ReferenceCache, ReferenceModel, _rotate
from engine.weights import load_weights
from tests.model_files import random_weights, tiny_gguf


def test_incremental_use_equals_one_pass(tmp_path: Path) -> None:
    model = ReferenceModel(load_weights(tiny_gguf(tmp_path / "t.gguf")))
    tokens = [5, 9, 200, 17, 3, 77, 8, 120, 44, 6]
    whole = model.forward(tokens)
    cache = ReferenceCache()
    parts = np.concatenate([model.forward(part, cache) for part in (tokens[:4], tokens[4:5], tokens[5:])])
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    assert cache.num_tokens == 10


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    model = ReferenceModel(load_weights(tiny_gguf(tmp_path / "t.gguf")))
    np.testing.assert_allclose(model.forward([5, 9, 200])[:2], model.forward([5, 9, 7])[:2], atol=2e-5)


def test_a_model_of_zero_matrices_sees_only_the_last_token(tmp_path: Path) -> None:
    """With all layers zero the residual is the embedding: logits = norm(e) · E, by hand."""
    weights = random_weights()
    for name, value in weights.items():
        if name.startswith("blk.") and "norm" not in name:
            value[:] = 0
    model = ReferenceModel(load_weights(tiny_gguf(tmp_path / "t.gguf", weights)))
    table, gain = weights["token_embd.weight"].astype(np.float64), weights["output_norm.weight"]
    row = table[9]
    expected = table @ (row / np.sqrt((row**2).mean() + 1e-5) * gain)
    np.testing.assert_allclose(model.forward([5, 9])[1], expected, rtol=1e-4, atol=1e-5)


def test_rotation_turns_pairs_by_their_angle() -> None:
    # (1, 0) turned by 90 degrees is (0, 1); (0, 2) is (-2, 0).
    x = np.array([[[1.0, 0.0, 0.0, 2.0]]], np.float32)
    cos, sin = np.zeros((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)
    np.testing.assert_array_equal(_rotate(x, cos, sin), [[[0.0, 1.0, -2.0, 0.0]]])


def test_greedy_stops_at_an_end_token_and_at_the_limit(tmp_path: Path) -> None:
    model = ReferenceModel(load_weights(tiny_gguf(tmp_path / "t.gguf")))
    assert len(model.greedy([5, 9], 4)) <= 4
    first = model.greedy([5, 9], 1)[0]
    ends = ReferenceModel(load_weights(tiny_gguf(tmp_path / "e.gguf", tokenizer__ggml__eos_token_id=first)))
    assert ends.greedy([5, 9], 5) == [first]
