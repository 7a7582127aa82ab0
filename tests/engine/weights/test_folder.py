"""Hugging Face folders, held against the same weights as GGUF."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engine.reference import ReferenceModel
from engine.weights import ModelFileError, load_weights
from tests.model_files import (
    CONTEXT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    Weights,
    random_weights,
    tiny_gguf,
)

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves_first(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from pairs (0, 1), (2, 3), … to all first elements, then all second ones."""
    rows = [
        head * HEAD_DIM + i for head in range(heads) for i in [*range(0, HEAD_DIM, 2), *range(1, HEAD_DIM, 2)]
    ]
    return np.ascontiguousarray(weight[rows])


def folder_tensors(weights: Weights) -> Weights:
    tensors: Weights = {}
    for name, value in weights.items():
        parts = name.removesuffix(".weight").split(".")
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(parts[-1])
        tensors[prefix + NAMES[parts[-1]] + ".weight"] = halves_first(value, heads) if heads else value
    return tensors


def config(**changes: Any) -> dict[str, Any]:
    values = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def write_folder(folder: Path, tensors: Weights, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    return folder


def test_same_logits_as_the_gguf_of_the_same_weights(tmp_path: Path) -> None:
    weights = random_weights()
    ours = ReferenceModel(load_weights(write_folder(tmp_path / "hf", folder_tensors(weights))))
    theirs = ReferenceModel(load_weights(tiny_gguf(tmp_path / "t.gguf", weights)))
    tokens = list(range(3, 40))
    np.testing.assert_allclose(ours.forward(tokens), theirs.forward(tokens), atol=1e-4)


def test_shards_by_index(tmp_path: Path) -> None:
    tensors = folder_tensors(random_weights())
    whole = load_weights(write_folder(tmp_path / "whole", tensors))
    folder = tmp_path / "sharded"
    write_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_weights(folder)
    assert {name: t.shape for name, t in loaded.tensors.items()} == {
        n: t.shape for n, t in whole.tensors.items()
    }
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"'b\.safetensors', which is missing"):
        load_weights(folder)


def test_ends_of_an_answer_come_from_the_generation_config_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", folder_tensors(random_weights()))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert load_weights(folder).config.eos_token_ids == (5, 2)


def test_llama3_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = write_folder(tmp_path / "hf", folder_tensors(random_weights()), rope_scaling=scaling)
    divisors = load_weights(folder).config.rope_scaling
    assert divisors is not None
    # Pair 0 turns 64 / 2pi = 10.2 times over the original context: more than 4, untouched.
    # Pair 2: 10.19 / 10000**(2/16) = 3.221 turns, share (3.221 - 1) / 3 = 0.7404 of the frequency stays.
    # Pair 4 turns 1.019 times, share 0.0062; pairs 5 to 15 less than once: all divided by 8.
    turns = 64 / (2 * math.pi) * 10000 ** (-2 / 16)
    share = (turns - 1) / 3
    assert divisors[:2] == (1, 1)
    assert divisors[2] == pytest.approx(1 / ((1 - share) / 8 + share))
    assert divisors[5:] == (8.0,) * 11


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"tie_word_embeddings": False}, "'output' is missing"),
        ({"num_hidden_layers": 3}, r"blk\.2"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = write_folder(tmp_path / "hf", folder_tensors(random_weights()), **changes)
    with pytest.raises(ModelFileError, match=named):
        load_weights(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", folder_tensors(random_weights()))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"\xff" * 8, whole[:100], whole[:-10], b"\x08" + bytes(7) + b"not json"):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"model\.safetensors"):
            load_weights(folder)
    path.unlink()
    with pytest.raises(ModelFileError, match="neither"):
        load_weights(folder)
