"""A Llama model out of a GGUF file: its configuration and its tensors under canonical names."""

from collections.abc import Iterator

import numpy as np

from engine.config import ModelConfig
from engine.weights.errors import ModelFileError
from engine.weights.gguf import GgufFile, RawTensor, Value
from engine.weights.kquants import DECODERS, to_q8_0
from engine.weights.tensor import KINDS, Tensor

_ROPE_FREQS = "rope_freqs.weight"
_TOKEN_CONTROL = 3
_END_TOKENS = frozenset(
    [
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<end_of_turn>",
        "</s>",
    ]
)
"""Control tokens that end an answer in the chat formats of Llama models; a file often names only one."""


def config_of(file: GgufFile) -> ModelConfig:
    """The model's shape. Raises ModelFileError when it is no plain Llama or a figure is missing or unfit."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise ModelFileError(f"{file.path}: architecture {architecture!r} is not supported, only 'llama' is")
    if file.get("llama.expert_count", int, 0):
        raise ModelFileError(
            f"{file.path}: a mixture of experts (llama.expert_count); only dense models are supported"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(
            f"{file.path}: tensor 'token_embd' is missing; the file is incomplete, fetch it again"
        )
    hidden, num_heads = file.get("llama.embedding_length", int), file.get("llama.attention.head_count", int)
    if num_heads < 1:
        raise ModelFileError(f"{file.path}: llama.attention.head_count is {num_heads}; the file is damaged")
    head_dim = file.get("llama.attention.key_length", int, hidden // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.get(key, int, head_dim) != head_dim:
            raise ModelFileError(
                f"{file.path}: {key} is {file.metadata[key]}, only the head size {head_dim} is supported"
            )
    context = file.get("llama.context_length", int)
    # Within its window, a sliding-window model is a plain one.
    window = file.get("llama.attention.sliding_window", int, 0)
    return ModelConfig(
        name=file.get("general.name", str, file.path.stem),
        num_layers=file.get("llama.block_count", int),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=file.get("llama.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        intermediate_size=file.get("llama.feed_forward_length", int),
        vocab_size=embedding.shape[0],
        max_context_tokens=min(context, window) if window else context,
        rms_norm_eps=file.get("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=file.get("llama.rope.freq_base", float, 10000.0),
        tied_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int, -1) if _has_bos(file) else None,
        eos_token_ids=_eos_token_ids(file),
        rope_scaling=_rope_scaling(file, head_dim),
    )


def tensors_of(file: GgufFile) -> Iterator[Tensor]:
    """The tensors as canonical ones; kinds the engine does not compute with become q8_0."""
    for raw in file.tensors.values():
        if raw.name != _ROPE_FREQS:
            yield _canonical(raw)


def _canonical(raw: RawTensor) -> Tensor:
    name = raw.name.removesuffix(".weight")
    if raw.kind in KINDS:
        return Tensor(name, raw.kind, raw.shape, raw.data)
    assert raw.kind in DECODERS
    return Tensor(name, "q8_0", raw.shape, to_q8_0(raw.kind, raw.data))


def _has_bos(file: GgufFile) -> bool:
    return "tokenizer.ggml.bos_token_id" in file.metadata


def _strings(file: GgufFile, key: str) -> list[Value]:
    return file.get(key, list, [])


def _eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    named = [
        file.get(f"tokenizer.ggml.{kind}_token_id", int)
        for kind in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{kind}_token_id" in file.metadata
    ]
    types = _strings(file, "tokenizer.ggml.token_type")
    by_text = [
        token_id
        for token_id, (text, kind) in enumerate(
            zip(_strings(file, "tokenizer.ggml.tokens"), types, strict=False)
        )
        if kind == _TOKEN_CONTROL and text in _END_TOKENS
    ]
    return tuple(dict.fromkeys(named + by_text))


def _rope_scaling(file: GgufFile, head_dim: int) -> tuple[float, ...] | None:
    """Per-frequency divisors: the file's own table (Llama 3.1), or one linear factor for all."""
    kind = file.get("llama.rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise ModelFileError(
            f"{file.path}: llama.rope.scaling.type {kind!r} is not supported ('none' and 'linear' are)"
        )
    factor = file.get("llama.rope.scaling.factor", float, 1.0) if kind == "linear" else 1.0
    divisors = np.full(head_dim // 2, factor, np.float64)
    table = file.tensors.get(_ROPE_FREQS)
    if table is not None:
        if table.kind != "f32" or table.shape != (head_dim // 2,):
            raise ModelFileError(f"{file.path}: {_ROPE_FREQS!r} should be {head_dim // 2} values of F32")
        divisors *= table.data.view("<f4")
    return None if np.all(divisors == 1) else tuple(float(value) for value in divisors)
