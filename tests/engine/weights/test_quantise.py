"""Block formats decoded value by value, as the format's description reads, against the vectorised decoders."""

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.weights.kquants import DECODERS, to_q8_0
from engine.weights.quantise import (
    MAX_ACTIVATION,
    MAX_WEIGHT,
    factor,
    quantise_per_channel,
    quantise_q8_0,
)
from engine.weights.tensor import Tensor, dequantise

Block = NDArray[np.uint8]


def half(block: Block, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def q5_0(block: Block, i: int) -> float:
    high = int(block[2:6].view("<u4")[0]) >> i & 1
    nibble = int(block[6 + i % 16]) >> (4 * (i // 16)) & 15
    return half(block, 0) * ((nibble | high << 4) - 16)


def q5_1(block: Block, i: int) -> float:
    high = int(block[4:8].view("<u4")[0]) >> i & 1
    nibble = int(block[8 + i % 16]) >> (4 * (i // 16)) & 15
    return half(block, 0) * (nibble | high << 4) + half(block, 2)


def crumb(packed: Block, i: int) -> int:
    """Value i of 2-bit fields: 128 values per 32 bytes, four runs of 32, one per shift."""
    part, rest = divmod(i, 128)
    return int(packed[part * 32 + rest % 32]) >> (2 * (rest // 32)) & 3


def q2_k(block: Block, i: int) -> float:
    scale = int(block[i // 16])
    return half(block, 80) * (scale & 15) * crumb(block[16:80], i) - half(block, 82) * (scale >> 4)


def q3_k(block: Block, i: int) -> float:
    packed, run = block[96:108], i // 16
    low = int(packed[run]) & 15 if run < 8 else int(packed[run - 8]) >> 4
    scale = (low | (int(packed[8 + run % 4]) >> (2 * (run // 4)) & 3) << 4) - 32
    kept = int(block[i % 32]) >> (i // 32) & 1
    return half(block, 108) * scale * (crumb(block[32:96], i) - (0 if kept else 4))


def scale_and_minimum(packed: Block, run: int) -> tuple[int, int]:
    if run < 4:
        return int(packed[run]) & 63, int(packed[run + 4]) & 63
    both = int(packed[run + 4])
    return both & 15 | int(packed[run - 4]) >> 6 << 4, both >> 4 | int(packed[run]) >> 6 << 4


def q4_k(block: Block, i: int) -> float:
    scale, minimum = scale_and_minimum(block[4:16], i // 32)
    value = int(block[16 + 32 * (i // 64) + i % 32]) >> (4 * (i // 32 % 2)) & 15
    return half(block, 0) * scale * value - half(block, 2) * minimum


def q5_k(block: Block, i: int) -> float:
    scale, minimum = scale_and_minimum(block[4:16], i // 32)
    value = int(block[48 + 32 * (i // 64) + i % 32]) >> (4 * (i // 32 % 2)) & 15
    value |= (int(block[16 + i % 32]) >> (i // 32) & 1) << 4
    return half(block, 0) * scale * value - half(block, 2) * minimum


def q6_k(block: Block, i: int) -> float:
    part, rest = divmod(i, 128)
    low = int(block[part * 64 + rest % 64]) >> (4 * (rest // 64)) & 15
    value = (low | crumb(block[128:192], i) << 4) - 32
    return half(block, 208) * int(block[192 + i // 16].view(np.int8)) * value


SCALAR = {"q5_0": q5_0, "q5_1": q5_1, "q2_k": q2_k, "q3_k": q3_k, "q4_k": q4_k, "q5_k": q5_k, "q6_k": q6_k}
HALVES = {
    "q5_0": [0],
    "q5_1": [0, 2],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}


def random_blocks(kind: str, count: int) -> Block:
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (count, DECODERS[kind][0]), dtype=np.uint8)
    for at in HALVES[kind]:  # finite scales
        blocks[:, at : at + 2] = rng.uniform(0.01, 1, (count, 1)).astype(np.float16).view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", list(SCALAR))
def test_decoders_follow_the_format(kind: str) -> None:
    blocks = random_blocks(kind, 4)
    decoded = DECODERS[kind][1](blocks)
    expected = [[SCALAR[kind](block, i) for i in range(decoded.shape[1])] for block in blocks]
    np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", list(SCALAR))
def test_conversion_to_q8_0_stays_within_half_a_step(kind: str) -> None:
    blocks = random_blocks(kind, 40)
    exact = DECODERS[kind][1](blocks)
    converted = dequantise(Tensor("x", "q8_0", exact.shape, to_q8_0(kind, blocks.reshape(-1))))
    # One step is max|x| / 127 of the run of 32; rounding the scale to f16 adds 2**-11 of the value.
    largest = np.abs(exact.reshape(-1, 32)).max(axis=1)
    allowed = largest * (0.5 / 127 + 2**-10)
    assert (np.abs(converted - exact).reshape(-1, 32).max(axis=1) <= allowed).all()


def test_q8_0_of_zeros_and_of_exact_values() -> None:
    values = np.zeros((2, 32), np.float32)
    values[1] = np.arange(-127, 128, 8)[:32] / np.float32(64)  # scale 127/64/127 = 2**-6 is exact
    blocks = quantise_q8_0(values)
    np.testing.assert_array_equal(dequantise(Tensor("x", "q8_0", (2, 32), blocks)), values)


def test_per_channel_scales_by_row() -> None:
    values = np.array([[127.0, -64.0, 1.0], [0.0, 0.0, 0.0], [0.5, -0.5, 0.25]], np.float32)
    quants, scales = quantise_per_channel(values)
    # 0.25 / (0.5 / 127) = 63.5, which rounds to the even 64.
    assert quants.tolist() == [[127, -64, 1], [0, 0, 0], [127, -127, 64]]
    assert scales.tolist() == pytest.approx([1.0, 0.0, 0.5 / 127])


def test_four_bit_scales_as_integers_stay_near_and_within_32_bits() -> None:
    rng = np.random.default_rng(0)
    # Two rows of 1,024 inputs, the second with one block a hundred times larger than the rest.
    d = rng.random((2, 32)).astype(np.float16)
    d[1] /= 100
    d[1, 7] = 1
    m = (-7.5 * d).astype(np.float16)
    steps, addends, scale = factor(d, m)
    q = np.arange(16)
    exact = d[..., None].astype(np.float64) * q + m[..., None]
    integers = steps[..., None].astype(np.int64) * q + addends[..., None]
    assert np.abs(integers * scale.astype(np.float64)[:, None, None] - exact).max() < 5 * scale.max()
    assert np.abs(integers).max() <= MAX_WEIGHT
    # The worst activations: every one at its largest, with the sign of its weight.
    assert (32 * np.abs(integers).max(axis=2).sum(axis=1) * MAX_ACTIVATION < 2**31).all()


def test_four_bit_zero_stays_zero_and_a_row_of_zeros_too() -> None:
    d = np.array([[0.3, -0.1], [0, 0]], np.float16)
    steps, addends, scale = factor(d, None)
    assert (steps * 8 + addends == 0).all()
    assert scale[1] == 1
    assert not steps[1].any()
    assert not factor(np.zeros((1, 2), np.float16), np.zeros((1, 2), np.float16))[1].any()


def test_a_row_too_long_for_sums_of_32_bits_is_refused() -> None:
    # 5 steps of rounding for each of 2^18 inputs exceed (2^31 - 1) / 2031 = 1,057,352.
    with pytest.raises(ValueError, match="262144 inputs"):
        factor(np.ones((1, 1 << 13), np.float16), None)


def test_per_channel_sums_stay_within_32_bits_however_long_a_row_is() -> None:
    # All weights equal: 127 · 2031 · 10,000 would be 2.6e9, so the scale grows until the sum fits.
    quants, scales = quantise_per_channel(np.full((1, 10_000), 0.5, np.float32))
    assert int(np.abs(quants.astype(np.int64)).sum()) * MAX_ACTIVATION < 2**31
    # (2^31 - 1) // 2031 - 10,000 = 1,047,352 for 5,000 in sizes.
    assert scales[0] == pytest.approx(5_000 / 1_047_352)
    with pytest.raises(ValueError, match="2000000 inputs"):
        quantise_per_channel(np.ones((1, 2_000_000), np.float32))
