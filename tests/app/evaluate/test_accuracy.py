import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from app.evaluate import corpus
from app.evaluate.accuracy import CHUNK_TOKENS, EngineScorer, ReferenceScorer, measure
from app.models import catalogue
from app.text import load_text
from engine.model import Model
from engine.reference import ReferenceModel
from engine.weights import load_weights


class Fixed:
    """The same distribution after every token."""

    def __init__(self, probabilities: list[float]) -> None:
        self._logits = np.log(np.array(probabilities, np.float32)) + np.float32(3)
        self.read_tokens = 0

    def restart(self) -> None:
        pass

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.read_tokens += len(tokens)
        return np.tile(self._logits, (len(tokens), 1))


def test_figures_by_hand() -> None:
    engine, reference = Fixed([0.5, 0.25, 0.25]), Fixed([0.25, 0.5, 0.25])
    # Predicted are 0, 1 in the first text and 2 in the second: the engine gives 1/2, 1/4, 1/4, the reference 1/4, 1/2,
    # 1/4; both lose 5 ln 2 over 3 tokens. KL(reference || engine) = 1/4 ln(1/2) + 1/2 ln 2 + 0 = ln(2) / 4.
    result = measure(engine, reference, [[2, 0, 1], [0, 2]])
    assert result.tokens == 3
    assert result.perplexity == pytest.approx(2 ** (5 / 3))
    assert result.perplexity_reference == pytest.approx(2 ** (5 / 3))
    assert result.top1_agreement == 0
    assert result.kl_mean == pytest.approx(math.log(2) / 4, rel=1e-5)
    assert engine.read_tokens == reference.read_tokens == 3, (
        "a last token predicts nothing and need not be read"
    )


def test_chunks_cover_a_long_text_once() -> None:
    text = [0] * (2 * CHUNK_TOKENS + 2)
    seen: list[int] = []
    result = measure(Fixed([0.5, 0.5]), Fixed([0.5, 0.5]), [text], seen.append)
    assert result.tokens == len(text) - 1
    assert seen == [CHUNK_TOKENS, 2 * CHUNK_TOKENS, 2 * CHUNK_TOKENS + 1]
    assert result.kl_mean == pytest.approx(0, abs=1e-7)
    assert result.top1_agreement == 1


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        measure(Fixed([1.0]), Fixed([1.0]), [[5], []])


def test_windows_give_as_many_tokens_as_wanted() -> None:
    windows = corpus.windows(lambda text: list(text.encode()), 30_000, 512)
    assert 30_000 - 32 <= sum(map(len, windows)) <= 30_000
    assert max(map(len, windows)) == 512
    assert min(map(len, windows)) >= 32
    assert corpus.cut([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]


def test_the_built_in_text_holds_enough_for_the_real_model() -> None:
    tokenizer = load_text(catalogue.pull(catalogue.DEFAULT_MODEL)).tokenizer
    assert sum(map(len, corpus.windows(tokenizer.encode, 20_500, 512))) >= 20_468


@pytest.mark.parametrize(
    ("num_tokens", "agreement"),
    [
        # 97.5 % of 20,449 tokens agree: of so few three deviations less, 3 · sqrt(0.975 · 0.025 / n).
        pytest.param(400, 0.951, id="some"),
        # The float32 reference takes minutes for these.
        pytest.param(5_200, 0.968, marks=[pytest.mark.slow, pytest.mark.timeout(1800)], id="many"),
    ],
)
def test_the_engine_is_within_one_percent_of_the_reference(num_tokens: int, agreement: float) -> None:
    entry = catalogue.pull(catalogue.DEFAULT_MODEL)
    texts = corpus.windows(load_text(entry).tokenizer.encode, num_tokens, 512)
    weights = load_weights(entry.path)
    model = Model(weights, num_threads=2)
    try:
        result = measure(EngineScorer(model, 512), ReferenceScorer(ReferenceModel(weights)), texts)
    finally:
        model.close()
    assert result.tokens >= num_tokens * 0.95
    assert result.perplexity == pytest.approx(result.perplexity_reference, rel=0.01)
    assert result.top1_agreement > agreement
    assert 0 <= result.kl_mean < 0.01
    # A model that predicts nothing has a perplexity of 49,152: that the text is English must show.
    assert result.perplexity_reference < 60
