"""Shape of a model and of a worker's KV cache: plain values, read from a model file or given on the command line."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-architecture transformer. Lengths in elements, `max_context_tokens` in tokens."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    rope_scaling: tuple[float, ...] | None = None
    """Per-frequency divisors, `head_dim / 2` of them (the `rope_freqs` of Llama 3.1); None: plain RoPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """How KV lies in memory, locally and in the pool: one contiguous run of bytes per block of tokens.

    A block is `[num_layers][2 (K, V)][num_kv_heads]`, each part `block_tokens × head_dim` integers of 8 bits
    and a 32-bit float for each token (their order: `engine/kernels/kv.py`); a partly filled block (the tail) has
    the same size and stride. `version` changes when the inner order does.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int = 32
    version: str = "i8-hadamard-1"

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers (SmolLM2-135M: 30 · 2 · 3 · (64 + 4) B = 12,240 B)."""
        return self.num_layers * 2 * self.num_kv_heads * (self.head_dim + 4)

    @property
    def block_bytes(self) -> int:
        """One block (SmolLM2-135M at 32 tokens: 391,680 B)."""
        return self.bytes_per_token * self.block_tokens
