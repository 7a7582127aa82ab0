"""Quantised products against NumPy: exact where the floats are, and the same bits on every path."""

import numpy as np
import pytest

from engine.kernels import available, choose
from engine.kernels.measure import Product, random_tensor
from engine.kernels.packing import Arena, PackedMatrix, pack, packed_bytes
from engine.weights.tensor import Tensor, dequantise

KINDS = ("q4_1", "q4_0", "q8_0")


def packed(*tensors: Tensor, interleave: bool = False) -> PackedMatrix:
    return pack(list(tensors), Arena(packed_bytes(list(tensors))), interleave=interleave)


def integer_tensor(kind: str, num_outputs: int, num_inputs: int) -> Tensor:
    """Scales 1 (and minima -3): every value a small whole number."""
    tensor = random_tensor(kind, num_outputs, num_inputs, seed=3)
    blocks = tensor.data.reshape(-1, {"q4_1": 20, "q4_0": 18, "q8_0": 34}[kind])
    blocks[:, :2] = np.array([1], np.float16).view(np.uint8)
    if kind == "q4_1":
        blocks[:, 2:4] = np.array([-3], np.float16).view(np.uint8)
    return tensor


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 16, 21, 37])
def test_whole_numbers_come_out_exact(path: str, kind: str, num_rows: int) -> None:
    """Activations of whole numbers whose largest is 2039 quantise to themselves, so each sum is exact (< 2^24)."""
    num_inputs, num_outputs = 96, 40
    tensor = integer_tensor(kind, num_outputs, num_inputs)
    rng = np.random.default_rng(num_rows)
    x = rng.integers(-40, 41, (num_rows, num_inputs)).astype(np.float32)
    x[:, 5] = 2039
    expected = x.astype(np.int64) @ dequantise(tensor).astype(np.int64).T
    np.testing.assert_array_equal(Product(choose(path), packed(tensor), x).run(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_gives_the_same_bits(kind: str) -> None:
    tensor = random_tensor(kind, 48, 160, seed=1)
    x = np.random.default_rng(2).standard_normal((19, 160)).astype(np.float32)
    results = [Product(choose(path), packed(tensor), x).run().tobytes() for path in available()]
    assert set(results) == {results[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_twelve_bits_of_activation_stay_within_their_rounding(kind: str) -> None:
    tensor = random_tensor(kind, 48, 160, seed=1)
    x = np.random.default_rng(2).standard_normal((8, 160)).astype(np.float32)
    weights = dequantise(tensor)
    # Each activation is off by at most half a quantum, max|x| / 2039 / 2.
    bound = np.abs(x).max(axis=1, keepdims=True) / 2039 / 2 * np.abs(weights).sum(axis=1) + 1e-4
    assert (np.abs(Product(choose(), packed(tensor), x).run() - x @ weights.T) <= bound).all()


def test_a_row_of_zeros_gives_zeros() -> None:
    tensor = random_tensor("q4_1", 16, 32, seed=1)
    assert not Product(choose(), packed(tensor), np.zeros((1, 32), np.float32)).run().any()


def test_joined_matrices_lie_one_after_another_or_in_turn() -> None:
    first, second = random_tensor("q4_0", 32, 64, seed=1), random_tensor("q4_0", 32, 64, seed=2)
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    a, b = (Product(choose(), packed(tensor), x).run().copy() for tensor in (first, second))
    joined = Product(choose(), packed(first, second), x).run()
    np.testing.assert_array_equal(joined, np.concatenate([a, b], axis=1))
    turns = Product(choose(), packed(first, second, interleave=True), x).run()
    np.testing.assert_array_equal(turns, np.concatenate([a[:, :16], b[:, :16], a[:, 16:], b[:, 16:]], axis=1))


def test_matrices_that_cannot_be_joined_are_named() -> None:
    with pytest.raises(ValueError, match="random q4_1: kind q4_1"):
        packed(random_tensor("q4_0", 32, 64, seed=1), random_tensor("q4_1", 32, 64, seed=1))
    with pytest.raises(ValueError, match="24 outputs, not a multiple of 16"):
        packed(random_tensor("q4_0", 24, 64, seed=1), random_tensor("q4_0", 32, 64, seed=1))


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels 'abacus' not available here"):
        choose("abacus")
