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


def octet_rows(num_rows: int, num_inputs: int) -> NDArray[np.float32]:
    """The same for 4-bit weights: also, 127 is no less than 4 times a row's mean.

    A third of that mean is one input of 2031 and small ones, the rest as many outliers as it allows.
    """
    rng = np.random.default_rng(num_rows)
    x = rng.integers(-4, 5, (num_rows, num_inputs)).astype(np.float32)
    for row in x:
        room = 127 * num_inputs // 4 - 2031 - 4 * num_inputs
        for place in rng.permutation(num_inputs):
            size = rng.integers(126, 400)
            if place == 5 or size > room:
                continue
            row[place] = size * rng.choice([-1, 1])
            room -= size
    x[:, 5] = 2031
    assert (np.abs(x).mean(axis=1) <= 127 / 4).all()
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
    x = octet_rows(num_rows, num_inputs)
    integers = x.astype(np.int64) @ weights.T
    assert np.abs(integers).max() < 2**31
    # Activations have the scale 1: 2031 is the largest of each row.
    expected = integers.astype(np.float32) * scale
    np.testing.assert_array_equal(Product(choose(path), packed(tensor), x).run(), expected)


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("num_rows", [1, 16, 64])
@pytest.mark.parametrize("value", [127, -127, 128, -128])
def test_four_bit_products_at_the_ends_of_their_bytes(path: str, num_rows: int, value: int) -> None:
    tensor = random_tensor("q4_0", 16, 1024, seed=3)
    blocks = tensor.data.reshape(-1, 18)
    blocks[:, 2:] = 0xFF
    d, m, q = blocks_of(tensor)
    assert (q == 15).all()
    steps, addends, scale = factor(d, m)
    weights = (steps[..., None].astype(np.int64) * q + addends[..., None]).reshape(16, 1024)
    # Four whole blocks: pairs of products sum to 2 · 15 · 127 = 3810 eight times, the most 16 bits must hold.
    x = np.zeros((num_rows, 1024), np.float32)
    x[:, 128:256] = value
    x[:, 1023] = 2031
    expected = (x.astype(np.int64) @ weights.T).astype(np.float32) * scale
    np.testing.assert_array_equal(Product(choose(path), packed(tensor), x).run(), expected)


@pytest.mark.parametrize("num_rows", [3, 64])
def test_a_quarter_of_a_row_may_be_outliers(num_rows: int) -> None:
    # 4 times the mean of 63 of 256 equal values and zeros is 0.98 of the value: all 63 are outliers, 129 each.
    tensor, rng = random_tensor("q4_1", 16, 256, seed=3), np.random.default_rng(1)
    x = np.zeros((num_rows, 256), np.float32)
    for row in x:
        row[rng.permutation(256)[:63]] = rng.choice([-1, 1], 63)
    exact = x @ dequantise(tensor).T
    results = [Product(choose(path), packed(tensor), x).run().copy() for path in available()]
    assert {result.tobytes() for result in results} == {results[0].tobytes()}
    # Half a step of 129 in each of 63 activations, and what weights lose, see below.
    d, m, _ = blocks_of(tensor)
    bound = 63 * (0.5 / 129 * np.abs(dequantise(tensor)).max(axis=1) + 5 * factor(d, m)[2]) + 1e-4
    assert (np.abs(results[0] - exact) <= bound).all()


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
@pytest.mark.parametrize("num_rows", [1, 3, 7, 19, 64])
def test_every_path_gives_the_same_bits(kind: str, num_rows: int) -> None:
    tensor = random_tensor(kind, 48, 160, seed=1)
    # Heavy tails: a few per cent are outliers.
    x = np.random.default_rng(2).standard_t(3, (num_rows, 160)).astype(np.float32)
    results = [Product(choose(path), packed(tensor), x).run().tobytes() for path in available()]
    assert set(results) == {results[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_stay_within_their_rounding(kind: str) -> None:
    tensor = random_tensor(kind, 48, 160, seed=1)
    x = np.random.default_rng(2).standard_normal((8, 160)).astype(np.float32)
    weights = dequantise(tensor)
    # Each activation is off by at most half a quantum: max|x| / 2031, for 4-bit weights 4 times the mean |x| / 127
    # where that is more.
    quantum = np.abs(x).max(axis=1, keepdims=True) / 2031
    if kind in ("q4_1", "q4_0"):
        quantum = np.maximum(quantum, 4 * np.abs(x).mean(axis=1, keepdims=True) / 127)
    bound = quantum / 2 * np.abs(weights).sum(axis=1) + 1e-4
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


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("kind", ["q4_1", "q8_0", "f32"])
@pytest.mark.parametrize("num_rows", [2, 64])
def test_what_is_no_number_stays_none_and_stays_in_its_row(path: str, kind: str, num_rows: int) -> None:
    matrix = packed(random_tensor(kind, 32, 576, seed=1))
    x = np.random.default_rng(0).standard_normal((num_rows, 576)).astype(np.float32)
    expected = Product(choose(path), matrix, x).run().copy()
    for value, places in ((np.nan, slice(None)), (np.nan, 5), (np.inf, 100), (-np.inf, slice(3, 500))):
        spoilt = x.copy()
        spoilt[1, places] = value
        out = Product(choose(path), matrix, spoilt).run()
        assert np.isnan(out[1]).all()
        assert np.delete(out, 1, axis=0).tobytes() == np.delete(expected, 1, axis=0).tobytes()


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("kind", ["q4_1", "q8_0", "f32"])
def test_a_row_too_small_for_a_scale_is_zeros(path: str, kind: str) -> None:
    # A step would be 10^-38 / 31.75 or less: one over it, 3 · 10^39, is beyond the floats.
    x = np.full((2, 576), 1e-38, np.float32)
    x[0] = 1.0
    out = Product(choose(path), packed(random_tensor(kind, 32, 576, seed=1)), x).run()
    assert not out[1].any()
    assert out[0].any()


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
