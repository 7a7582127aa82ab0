"""The ground truth: the same model as a plain float32 NumPy forward, one sequence at a time.

Written to be read, not to be fast. Tests hold the engine against it, and `cloudmatrix eval accuracy` reports
how far the engine as served is from it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.weights import ModelWeights, dequantise
from engine.weights.tensor import F32


class ReferenceCache:
    """Keys and values of one sequence, float32: per layer [tokens, num_kv_heads, head_dim]."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[F32, F32]] = {}

    def extend(self, layer: int, keys: F32, values: F32) -> tuple[F32, F32]:
        """Append the new rows and return the whole sequence's keys and values."""
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys, values = np.concatenate([old_keys, keys]), np.concatenate([old_values, values])
        self.layers[layer] = (keys, values)
        return keys, values

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return len(self.layers[0][0]) if self.layers else 0


class ReferenceModel:
    """All weights dequantised to float32 (4 bytes each in memory)."""

    def __init__(self, weights: ModelWeights) -> None:
        self.config = weights.config
        self._weights = {name: dequantise(tensor) for name, tensor in weights.tensors.items()}
        self._output = self._weights.get("output", self._weights["token_embd"])

    def forward(self, tokens: Sequence[int], cache: ReferenceCache | None = None) -> F32:
        """Logits after each of `tokens`, which follow those in `cache` and join it: [tokens, vocab]."""
        return self.logits(self.hidden(tokens, cache))

    def logits(self, hidden: F32) -> F32:
        """Final hidden states [rows, hidden_size] to logits [rows, vocab]."""
        return self._norm(hidden, "output_norm") @ self._output.T

    def hidden(self, tokens: Sequence[int], cache: ReferenceCache | None = None) -> F32:
        """Hidden states after the last layer, before the output norm: [tokens, hidden_size]."""
        cache = cache if cache is not None else ReferenceCache()
        first = cache.num_tokens
        positions = np.arange(first, first + len(tokens))
        cos, sin = self._rotation(positions)
        x = self._weights["token_embd"][np.asarray(tokens, np.int64)]
        for layer in range(self.config.num_layers):
            x += self._attention(layer, x, positions, cos, sin, cache)
            x += self._feed_forward(layer, x)
        return x

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The most probable continuation, up to and including an end token."""
        cache = ReferenceCache()
        generated: list[int] = []
        hidden = self.hidden(prompt, cache)
        while len(generated) < max_tokens:
            token = int(np.argmax(self.logits(hidden[-1:])[0]))
            generated.append(token)
            if token in self.config.eos_token_ids:
                break
            hidden = self.hidden([token], cache)
        return generated

    def _norm(self, x: F32, name: str) -> F32:
        mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
        scale = np.sqrt(mean_square + np.float32(self.config.rms_norm_eps)).astype(np.float32)
        return (x / scale) * self._weights[name]

    def _rotation(self, positions: NDArray[np.int64]) -> tuple[F32, F32]:
        """Cosines and sines of each position's angles: [tokens, 1, head_dim / 2]."""
        pairs = np.arange(self.config.head_dim // 2)
        frequencies = self.config.rope_theta ** (-2.0 * pairs / self.config.head_dim)
        if self.config.rope_scaling is not None:
            frequencies = frequencies / np.array(self.config.rope_scaling)
        angles = positions[:, None, None] * frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _attention(
        self, layer: int, x: F32, positions: NDArray[np.int64], cos: F32, sin: F32, cache: ReferenceCache
    ) -> F32:
        config, name = self.config, f"blk.{layer}."
        normed = self._norm(x, name + "attn_norm")
        queries = self._heads(normed, name + "attn_q", config.num_heads)
        keys = self._heads(normed, name + "attn_k", config.num_kv_heads)
        values = self._heads(normed, name + "attn_v", config.num_kv_heads)
        keys, values = cache.extend(layer, _rotate(keys, cos, sin), values)
        group = config.num_heads // config.num_kv_heads
        queries = _rotate(queries, cos, sin).reshape(len(x), config.num_kv_heads, group, config.head_dim)
        # [kv heads, group, tokens, all tokens]
        scores = queries.transpose(1, 2, 0, 3) @ keys.transpose(1, 2, 0)[:, None]
        scores *= np.float32(config.head_dim**-0.5)
        future = np.arange(len(keys)) > positions[:, None]
        scores[..., future] = -np.inf
        mixed: F32 = _softmax(scores) @ values.transpose(1, 0, 2)[:, None]
        return mixed.transpose(2, 0, 1, 3).reshape(len(x), -1) @ self._weights[name + "attn_output"].T

    def _heads(self, x: F32, name: str, num_heads: int) -> F32:
        return (x @ self._weights[name].T).reshape(len(x), num_heads, self.config.head_dim)

    def _feed_forward(self, layer: int, x: F32) -> F32:
        name = f"blk.{layer}."
        normed = self._norm(x, name + "ffn_norm")
        gate = normed @ self._weights[name + "ffn_gate"].T
        up = normed @ self._weights[name + "ffn_up"].T
        gated: F32 = gate / (1 + np.exp(-gate)) * up
        return gated @ self._weights[name + "ffn_down"].T


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotary positions on interleaved pairs (x[2i], x[2i+1]) of [tokens, heads, head_dim]."""
    out = np.empty_like(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _softmax(scores: F32) -> F32:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    normalised: F32 = weights / weights.sum(axis=-1, keepdims=True)
    return normalised
