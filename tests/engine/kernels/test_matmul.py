"""Quantised products against NumPy: exact where the floats are, and the same bits on every path."""

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.kernels import available, choose
from engine.kernels.measure import Product, random_tensor
from engine.kernels.packing import Arena, PackedMatrix, pack, packed_bytes
from engine.weights.quantise import factor, quantise_per_channel
from engine.weights.tensor import Tensor, dequantise

KINDS = ("q4_1", "q4_0", "q8_0", "f32")


def packed(*tensors: Tensor, interleave: bool = False) -> PackedMatrix:
    return pack(list(tensors), Arena(packed_bytes(list(tensors))), interleave=interleave)


def blocks_of(tensor: Tensor) -> tuple[NDArray[np.float16], NDArray[np.float16] | None, NDArray[np.int64]]:
    """d, m and q = 0..15 of a 4-bit tensor as shipped: [rows, blocks], [rows, blocks], [rows, blocks, 32]."""
    width = {"q4_1": 20, "q4_0": 18}[tensor.kind]
    raw = tensor.data.reshape(tensor.shape[0], -1, width)
    halves = np.ascontiguousarray(raw[..., : width - 16]).view(np.float16)
    packed = raw[..., width - 16 :]
    q = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int64)
    return halves[..., 0], halves[..., 1] if tensor.kind == "q4_1" else None, q


def whole_rows(num_rows: int, num_inputs: int) -> NDArray[np.float32]:
    """Activations that quantise to themselves: whole numbers whose largest is 2031."""
    x = np.random.default_rng(num_rows).integers(-2031, 2032, (num_rows, num_inputs)).astype(np.float32)
    x[:, 5] = 2031
    return x


ROWS = [1, 2, 3, 4, 7, 8, 16, 21, 37, 530]
"""With and without tiles, tiles with rest, more rows than one call of the tiles takes."""


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("kind", ["q4_1", "q4_0"])
@pytest.mark.parametrize("num_inputs", [96, 128, 1600])
@pytest.mark.parametrize("num_rows", ROWS)
def test_four_bit_products_are_exact_integers_scaled_once(
    path: str, kind: str, num_inputs: int, num_rows: int
) -> None:
    tensor = random_tensor(kind, 40, num_inputs, seed=3)
    d, m, q = blocks_of(tensor)
    steps, addends, scale = factor(d, m)
    weights = (steps[..., None].astype(np.int64) * q + addends[..., None]).reshape(40, num_inputs)
    x = whole_rows(num_rows, num_inputs)
    integers = x.astype(np.int64) @ weights.T
    assert np.abs(integers).max() < 2**31
    # Activations have the scale 1, for their largest is 2031.
    expected = integers.astype(np.float32) * scale
    np.testing.assert_array_equal(Product(choose(path), packed(tensor), x).run(), expected)


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("num_inputs", [96, 1600])
@pytest.mark.parametrize("num_rows", ROWS)
def test_products_per_channel_are_exact_integers_scaled_once(
    path: str, num_inputs: int, num_rows: int
) -> None:
    tensor = random_tensor("f32", 40, num_inputs, seed=3)
    quants, scale = quantise_per_channel(dequantise(tensor))
    x = whole_rows(num_rows, num_inputs)
    expected = (x.astype(np.int64) @ quants.astype(np.int64).T).astype(np.float32) * scale
    np.testing.assert_array_equal(Product(choose(path), packed(tensor), x).run(), expected)


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("num_rows", ROWS)
def test_eight_bit_products_of_whole_numbers_are_exact(path: str, num_rows: int) -> None:
    tensor = random_tensor("q8_0", 40, 96, seed=3)
    blocks = tensor.data.reshape(-1, 34)
    blocks[:, :2] = np.array([1], np.float16).view(np.uint8)
    # |x| ≤ 40 but for one: every sum stays below 2^24, where floats are exact.
    x = np.clip(whole_rows(num_rows, 96), -40, 40)
    x[:, 5] = 2031
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
    # Each activation is off by at most half a quantum, max|x| / 2031 / 2.
    bound = np.abs(x).max(axis=1, keepdims=True) / 2031 / 2 * np.abs(weights).sum(axis=1) + 1e-4
    if kind == "f32":
        # Each weight by at most half of its row's scale.
        bound += 0.5 * quantise_per_channel(weights)[1] * np.abs(x).sum(axis=1, keepdims=True)
    elif kind != "q8_0":
        # Each weight by less than 5 of its row's steps: 8 · 0.5 for D, 0.5 for M, and rounding.
        d, m, _ = blocks_of(tensor)
        bound += 5 * factor(d, m)[2] * np.abs(x).sum(axis=1, keepdims=True)
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
