import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.kernels.sampling import weigh
from engine.protocol import SamplingParams
from engine.sampler import SampleRow, sample, uniform


def params(seed: int = 0, temperature: float = 1.0, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=seed, temperature=temperature, **others)  # type: ignore[arg-type]


def one(logits: list[float], wanted: SamplingParams, position: int = 0, **context: object) -> int:
    row = SampleRow(wanted, position, **context)  # type: ignore[arg-type]
    return sample(np.array([logits], np.float32), [row])[0].token_id


def drawn(logits: list[float], wanted: SamplingParams, count: int = 4000) -> NDArray[np.int64]:
    """How often each token comes up over `count` positions."""
    row = np.array([logits], np.float32)
    tokens = [sample(row, [SampleRow(wanted, position)])[0].token_id for position in range(count)]
    return np.bincount(tokens, minlength=len(logits))


def kept_by_definition(logits: NDArray[np.float32], wanted: SamplingParams) -> list[int]:
    """Min-p, top-k, top-p by their definitions over the whole sorted vocabulary."""
    scaled = logits.astype(np.float64) / wanted.temperature
    weights = np.exp(scaled - scaled.max())
    order = [int(i) for i in np.argsort(-logits, kind="stable") if weights[i] >= wanted.min_p]
    if wanted.top_k:
        order = order[: wanted.top_k]
    total, reached, kept = weights[order].sum(), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token]
        if reached >= wanted.top_p * total:
            break
    return kept


def test_greedy_takes_the_best_and_the_lower_id_of_equals() -> None:
    assert one([1.0, 3.0, 3.0, 2.0], params(temperature=0)) == 1
    assert one([1.0, 3.0, 3.5, 2.0], params(temperature=1e-7)) == 2


def test_weights_are_the_same_bits_on_every_machine() -> None:
    """The digest is of additions, products and fused ones alone, which IEEE 754 defines to the bit; 1,003 floats end in
    lanes that are no whole vector."""
    below = np.append(np.linspace(0, 90, 1002), np.inf).astype(np.float32)
    weights = np.empty_like(below)
    weigh(below.ctypes.data, len(below), weights.ctypes.data)
    assert hashlib.sha256(weights.tobytes()).hexdigest()[:16] == "e37a696d174ec66b"
    assert (weights[0], weights[-1]) == (1, 0)
    # Up to 70: the power of two is right to 3 parts in a million; its exponent of up to 101 is rounded to 2**-18 twice,
    # by half of that: 2 · 2**-18 / 2 · ln 2 = 2.6 parts each way.
    np.testing.assert_allclose(weights[:780], np.exp(-below[:780].astype(np.float64)), rtol=8e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5]
    counts = drawn(logits, params(seed=11, temperature=temperature))
    weights = np.exp(np.array(logits) / temperature)
    expected = weights / weights.sum() * counts.sum()
    # Chi-square with 4 degrees of freedom exceeds 18.47 once in 1,000 seeds; the seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 18.47


def test_filters_leave_the_distribution_within_them_as_it_was() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.07, 0.03)]
    # 0.4 + 0.3 = 0.7 is short of 0.8, with 0.2 it is reached: three tokens stay, as 4 : 3 : 2.
    counts = drawn(logits, params(seed=5, top_p=0.8))
    assert counts[3:].tolist() == [0, 0]
    expected = np.array([4, 3, 2]) / 9 * counts.sum()
    assert ((counts[:3] - expected) ** 2 / expected).sum() < 13.82  # 2 degrees of freedom, 1 in 1,000
    assert set(np.flatnonzero(drawn(logits, params(seed=5, top_k=2)))) == {0, 1}
    # Tokens at least half as likely as the best: 0.4, 0.3 and 0.2.
    assert set(np.flatnonzero(drawn(logits, params(seed=5, min_p=0.499)))) == {0, 1, 2}
    # top_p counts within what top_k left: 0.4 / 0.7 = 0.57 reaches 0.5.
    assert set(np.flatnonzero(drawn(logits, params(seed=5, top_k=2, top_p=0.5)))) == {0}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(2, 3000),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0, 40.0]),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 1e-4, 0.2]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
)
def test_only_what_the_filters_keep_is_drawn(
    seed: int, size: int, spread: float, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = (np.random.default_rng(seed).normal(0, 1, size) * spread).round(2).astype(np.float32)
    wanted = params(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = kept_by_definition(logits, wanted)
    # A tolerance of one token: float32 and float64 sums may put the cut on either side of a neighbour.
    kept_and_next = {
        *kept_by_definition(logits, params(**{**_fields(wanted), "top_p": min(1.0, top_p + 1e-5)})),
        *kept,
    }
    tokens = {sample(logits[None], [SampleRow(wanted, p)])[0].token_id for p in range(40)}
    assert tokens <= kept_and_next


def _fields(wanted: SamplingParams) -> dict[str, object]:
    return {name: getattr(wanted, name) for name in ("seed", "temperature", "top_k", "top_p", "min_p")}


def test_a_long_tail_is_cut_exactly() -> None:
    # 10,000 equal tokens, half of the mass: exactly the first 5,000 ids can come up.
    row = np.zeros((1, 10_000), np.float32)
    tokens = [sample(row, [SampleRow(params(seed=3, top_p=0.5), p)])[0].token_id for p in range(3000)]
    assert max(tokens) < 5000
    assert max(tokens) > 4900  # all of 3,000 draws below 4,900: 0.98**3000 = 5e-27


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(-(2**63), 2**63), order=st.permutations(range(8)), copies=st.integers(1, 3))
def test_a_draw_does_not_depend_on_the_batch(seed: int, order: list[int], copies: int) -> None:
    logits = np.random.default_rng(1).normal(0, 2, (8, 500)).astype(np.float32)
    rows = [
        SampleRow(
            params(seed + i, 0.9, top_p=0.8, top_k=i * 9, logprobs=2, presence_penalty=0.5), i * 7, {i: 2}
        )
        for i in range(8)
    ]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(8)]
    chosen = order * copies
    assert sample(logits[chosen], [rows[i] for i in chosen]) == [alone[i] for i in chosen]


def test_seed_and_position_each_change_the_draw() -> None:
    row = [0.0] * 1000
    by_position = {one(row, params(seed=1), position) for position in range(50)}
    by_seed = {one(row, params(seed=seed), 0) for seed in range(50)}
    assert len(by_position) > 40
    assert len(by_seed) > 40
    assert one(row, params(seed=9), 4) == one(row, params(seed=9), 4)


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for values in ([uniform(7, p) for p in range(20_000)], [uniform(s, 3) for s in range(20_000)]):
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        # 19 degrees of freedom: 43.8 is exceeded once in 1,000.
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
        assert 0 <= min(values) < max(values) < 1


def test_penalties() -> None:
    greedy = {"temperature": 0}
    counts = {0: 3}
    # 5 - 3·1 - 0.5 = 1.5 is below 2; with one of them alone the token stays.
    both = params(**greedy, frequency_penalty=1.0, presence_penalty=0.5)  # type: ignore[arg-type]
    assert one([5.0, 2.0], both, token_counts=counts) == 1
    assert one([5.0, 2.0], params(**greedy, presence_penalty=2.5), token_counts=counts) == 0  # type: ignore[arg-type]
    assert one([5.0, 2.0], both, token_counts=None) == 0
    # Repetition divides positive logits (5 / 2 = 2.5 < 3) and multiplies negative ones (-1 · 2 = -2 < -1.5).
    repetition = params(**greedy, repetition_penalty=2.0)  # type: ignore[arg-type]
    assert one([5.0, 3.0], repetition, token_counts=counts) == 1
    assert one([5.0, 3.0], repetition, prompt_token_set={0}) == 1
    assert one([-1.0, -1.5], repetition, prompt_token_set={0}) == 1


def test_bias_forces_and_forbids() -> None:
    assert one([5.0, 2.0, 1.0], params(temperature=0, logit_bias={2: 100.0, 77: 100.0, -1: 100.0})) == 2
    assert one([5.0, 2.0, 1.0], params(temperature=0, logit_bias={0: -100.0})) == 1


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.array([[math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]], np.float32)
    wanted = params(temperature=0, logprobs=3, logit_bias={2: 100.0})
    logprob = sample(logits, [SampleRow(wanted, 0)])[0].logprob
    assert logprob is not None
    assert logprob.token_id == 2
    assert logprob.logprob == pytest.approx(math.log(0.125), abs=1e-6)
    assert [token for token, _ in logprob.top] == [0, 1, 2]
    assert [value for _, value in logprob.top] == pytest.approx(
        [math.log(p) for p in (0.5, 0.25, 0.125)], abs=1e-6
    )
    none = sample(logits, [SampleRow(params(logprobs=0), 0)])[0].logprob
    assert none is not None
    assert none.top == []
    assert sample(logits, [SampleRow(params(), 0)])[0].logprob is None


def test_impossible_tokens_never_come_up() -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0]
    assert set(np.flatnonzero(drawn(logits, params(seed=2), 500))) == {1, 3}
    assert set(np.flatnonzero(drawn(logits, params(seed=2, top_k=3, top_p=0.99), 500))) == {1, 3}


def test_the_logits_are_left_as_they_are() -> None:
    logits = np.arange(20, dtype=np.float32).reshape(2, 10)
    before = logits.copy()
    sample(logits, [SampleRow(params(logit_bias={1: 5.0}, top_p=0.5), 0)] * 2)
    np.testing.assert_array_equal(logits, before)


def test_broken_logits_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ArithmeticError, match="position 4"):
        one([1.0, math.nan], params(), 4)
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sample(np.zeros((2, 3), np.float32), [SampleRow(params(), 0)])
