"""The engine as served against the float32 reference of the same weights, token by token."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.kv_cache import KVCache
from engine.model import Model, StepBatch
from engine.reference import ReferenceCache, ReferenceModel

F32 = NDArray[np.float32]

CHUNK_TOKENS = 128


class Scorer(Protocol):
    """Reads one text from left to right."""

    def restart(self) -> None:
        """Forget what was read."""

    def read(self, tokens: Sequence[int]) -> F32:
        """Logits after each of the next tokens: [tokens, vocabulary]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Over `tokens` predicted tokens. `top1_agreement`: share where both hold the same token to be the best.

    `kl_mean`: mean Kullback-Leibler divergence of the engine's distribution from the reference's, in nats.
    """

    perplexity: float
    perplexity_reference: float
    top1_agreement: float
    kl_mean: float
    tokens: int


class EngineScorer:
    """The engine as a worker drives it: quantised weights, paged float16 KV, chunked prefill."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        """`max_tokens`: the longest text to be read."""
        self._model = model
        num_blocks = -(-max_tokens // model.layout.block_tokens)
        self._cache: KVCache = model.new_cache(num_blocks)
        # Blocks in reverse: a block table that is not the identity.
        self._table = np.arange(num_blocks, dtype=np.int32)[::-1].reshape(1, -1).copy()
        self._position = 0

    def restart(self) -> None:
        """Forget what was read."""
        self._position = 0

    def read(self, tokens: Sequence[int]) -> F32:
        """Logits after each of the next tokens; valid until the next call."""
        count = len(tokens)
        batch = StepBatch(
            tokens=np.array(tokens, np.int32),
            query_start=np.array([0, count], np.int32),
            first_position=np.array([self._position], np.int32),
            block_tables=self._table,
            logit_rows=np.arange(count, dtype=np.int32),
        )
        self._position += count
        return self._model.forward(batch, self._cache)


class ReferenceScorer:
    """The plain float32 forward."""

    def __init__(self, model: ReferenceModel) -> None:
        self._model = model
        self._cache = ReferenceCache()

    def restart(self) -> None:
        """Forget what was read."""
        self._cache = ReferenceCache()

    def read(self, tokens: Sequence[int]) -> F32:
        """Logits after each of the next tokens."""
        return self._model.forward(tokens, self._cache)


def measure(
    engine: Scorer,
    reference: Scorer,
    texts: Iterable[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> Accuracy:
    """Let both predict every token of `texts` from those before it; `progress` gets the tokens done so far.

    Raises ValueError when the texts hold nothing to predict.
    """
    count = agreed = 0
    loss = loss_reference = divergence = 0.0
    for text in texts:
        engine.restart()
        reference.restart()
        for begin in range(0, len(text) - 1, CHUNK_TOKENS):
            chunk = text[begin : min(begin + CHUNK_TOKENS, len(text) - 1)]
            following = np.array(text[begin + 1 : begin + 1 + len(chunk)])
            ours, theirs = _log_softmax(engine.read(chunk)), _log_softmax(reference.read(chunk))
            rows = np.arange(len(chunk))
            loss -= float(ours[rows, following].sum(dtype=np.float64))
            loss_reference -= float(theirs[rows, following].sum(dtype=np.float64))
            agreed += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
            divergence += float((np.exp(theirs) * (theirs - ours)).sum(dtype=np.float64))
            count += len(chunk)
            if progress is not None:
                progress(count)
    if not count:
        raise ValueError("the text has no token to predict; give at least two tokens")
    return Accuracy(
        perplexity=math.exp(loss / count),
        perplexity_reference=math.exp(loss_reference / count),
        top1_agreement=agreed / count,
        kl_mean=divergence / count,
        tokens=count,
    )


def _log_softmax(logits: F32) -> F32:
    shifted: F32 = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted
