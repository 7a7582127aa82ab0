"""A Llama model out of a Hugging Face folder: its configuration and its tensors under canonical names."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.config import ModelConfig
from engine.weights.errors import ModelFileError
from engine.weights.safetensors import StoredTensor, read_json
from engine.weights.tensor import Tensor

T = TypeVar("T", int, float)

_MODEL_TYPES = ("llama", "mistral")
"""`config.json` model types that are the plain Llama architecture."""

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config_of(folder: Path) -> ModelConfig:
    """The model's shape. Raises ModelFileError when it is no plain Llama or a figure is missing or unfit."""
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") not in _MODEL_TYPES:
        raise ModelFileError(
            f"{path}: architecture {values.get('model_type')!r} is not supported, only {' and '.join(_MODEL_TYPES)} are"
        )
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if values.get(key, plain) != plain:
            raise ModelFileError(f"{path}: {key} {values[key]!r} is not supported, only {plain!r} is")
    if values.get("quantization_config"):
        raise ModelFileError(
            f"{path}: weights quantised in this way are not supported; take the model in 16 bit or GGUF"
        )
    hidden, num_heads = (
        _figure(path, values, "hidden_size", int),
        _figure(path, values, "num_attention_heads", int),
    )
    if num_heads < 1:
        raise ModelFileError(f"{path}: num_attention_heads is {num_heads}")
    head_dim = _figure(path, values, "head_dim", int, hidden // num_heads)
    # transformers 5 gathers what concerns RoPE in `rope_parameters`; before, it was two keys.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = _figure(path, {**values, **rope}, "rope_theta", float, 10000.0)
    context = _figure(path, values, "max_position_embeddings", int)
    window = values.get("sliding_window") or context
    return ModelConfig(
        name=folder.name,
        num_layers=_figure(path, values, "num_hidden_layers", int),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=_figure(path, values, "num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        intermediate_size=_figure(path, values, "intermediate_size", int),
        vocab_size=_figure(path, values, "vocab_size", int),
        max_context_tokens=min(context, window),
        rms_norm_eps=_figure(path, values, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=_eos_token_ids(folder, values),
        rope_scaling=_rope_divisors(path, rope, theta, head_dim),
    )


def tensors_of(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Iterator[Tensor]:
    """The tensors as canonical ones, Q and K with interleaved RoPE pairs."""
    for name, tensor in stored.items():
        canonical = _canonical_name(name)
        if canonical is None or (canonical == "output" and config.tied_embeddings):
            continue
        data = tensor.data
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(canonical.rpartition(".")[2])
        if heads is not None and len(tensor.shape) == 2 and tensor.shape[0] == heads * config.head_dim:
            # The folder pairs row i of a head with row i + head_dim / 2, the engine rows 2i and 2i + 1.
            halves = data.reshape(heads, 2, config.head_dim // 2, -1)
            data = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)
        yield Tensor(canonical, tensor.kind, tensor.shape, data)


def _canonical_name(name: str) -> str | None:
    """None for a tensor that follows from the configuration; an unknown name stays as it is."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return _NAMES[stem]
    prefix, _, rest = stem.removeprefix("model.layers.").partition(".")
    if stem.startswith("model.layers.") and prefix.isdigit() and rest in _NAMES and name != stem:
        return f"blk.{prefix}.{_NAMES[rest]}"
    return name


def _figure(path: Path, values: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelFileError(f"{path}: has no {key!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
        raise ModelFileError(f"{path}: {key!r} should be a number of type {kind.__name__}, it is {value!r}")
    return kind(value)


def _eos_token_ids(folder: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    """Ends of an answer; generation_config.json, where there is one, knows the chat format's too."""
    sources = [values]
    if (folder / "generation_config.json").exists():
        sources.insert(0, read_json(folder / "generation_config.json"))
    ids: list[int] = []
    for source in sources:
        named = source.get("eos_token_id")
        ids += named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys(ids))


def _rope_divisors(
    path: Path, rope: Mapping[str, Any], theta: float, head_dim: int
) -> tuple[float, ...] | None:
    """What each frequency is divided by, for the scaling kinds `linear` and `llama3`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ModelFileError(f"{path}: RoPE scaling {kind!r} is not supported ('linear' and 'llama3' are)")
    factor = _figure(path, rope, "factor", float)
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    low = _figure(path, rope, "low_freq_factor", float)
    high = _figure(path, rope, "high_freq_factor", float)
    original = _figure(path, rope, "original_max_position_embeddings", float)
    divisors: list[float] = []
    for pair in range(head_dim // 2):
        turns = original * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        # Fast frequencies stay, slow ones are divided, those between go over smoothly (Llama 3.1).
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return tuple(divisors)
