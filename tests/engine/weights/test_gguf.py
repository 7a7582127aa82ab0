from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.weights import ModelFileError, dequantise, load_weights
from tests.model_files import HIDDEN, metadata, random_weights, tiny_gguf, write_gguf


def test_reads_configuration_and_weights_under_canonical_names(tmp_path: Path) -> None:
    weights = random_weights()
    model = load_weights(tiny_gguf(tmp_path / "tiny.gguf", weights))
    config = model.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (2, 64, 2, 1)
    assert (config.head_dim, config.intermediate_size, config.max_context_tokens) == (32, 96, 256)
    assert config.tied_embeddings
    assert config.bos_token_id == 1
    # 2 is named by the file; 0 is the control token <|endoftext|>, which ends answers too.
    assert config.eos_token_ids == (2, 0)
    assert set(model.tensors) == {name.removesuffix(".weight") for name in weights}
    np.testing.assert_array_equal(
        dequantise(model.tensors["blk.1.ffn_down"]), weights["blk.1.ffn_down.weight"]
    )


def test_values_of_quantised_kinds_follow_the_format(tmp_path: Path) -> None:
    # Scale 2.0 is f16 0x4000, minimum -1.0 is 0xbc00. Byte 0x51 holds nibbles 1 (value 0) and 5 (value 16).
    scale, minimum = b"\x00\x40", b"\x00\xbc"
    tensors = {
        "a.weight": ("q4_0", (32,), scale + b"\x51" * 16),
        "b.weight": ("q4_1", (32,), scale + minimum + b"\x51" * 16),
        "c.weight": ("q8_0", (32,), scale + bytes([253] * 32)),  # -3 as a signed byte
        "d.weight": ("f16", (2,), b"\x00\x40\x00\xbc"),
    }
    from engine.weights.gguf import read_gguf
    from engine.weights.tensor import Tensor

    file = read_gguf(write_gguf(tmp_path / "kinds.gguf", {}, tensors))
    values = {name: dequantise(Tensor(name, t.kind, t.shape, t.data)) for name, t in file.tensors.items()}
    assert values["a.weight"].tolist() == [2.0 * (1 - 8)] * 16 + [2.0 * (5 - 8)] * 16
    assert values["b.weight"].tolist() == [2.0 * 1 - 1.0] * 16 + [2.0 * 5 - 1.0] * 16
    assert values["c.weight"].tolist() == [-6.0] * 32
    assert values["d.weight"].tolist() == [2.0, -1.0]


def test_llama3_frequency_table_becomes_divisors(tmp_path: Path) -> None:
    table = np.linspace(1, 8, 16, dtype=np.float32)
    path = tiny_gguf(tmp_path / "t.gguf", random_weights() | {"rope_freqs.weight": table})
    assert load_weights(path).config.rope_scaling == pytest.approx(table.tolist())


def test_digest_is_of_the_content_and_remembered(tmp_path: Path) -> None:
    one, other = tiny_gguf(tmp_path / "one.gguf"), tiny_gguf(tmp_path / "other.gguf")
    different = tiny_gguf(tmp_path / "different.gguf", random_weights(seed=1))
    digest = load_weights(one).digest
    assert digest == load_weights(other).digest != load_weights(different).digest
    (tmp_path / "one.gguf.digest").write_text(
        (tmp_path / "one.gguf.digest").read_text().replace(digest, "f00")
    )
    assert load_weights(one).digest == "f00", "the remembered digest was not used"
    one.write_bytes(different.read_bytes())
    assert load_weights(one).digest == load_weights(different).digest, "a changed file kept its old digest"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general__architecture": "qwen2"}, "qwen2"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__block_count": None}, "llama.block_count"),
        ({"llama__attention__head_count": 0}, "head_count"),
        ({"llama__attention__head_count_kv": 3}, "KV heads"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count"),
        ({"llama__embedding_length": "wide"}, "llama.embedding_length"),
        ({"llama__feed_forward_length": 128}, "ffn_gate"),
        ({"llama__block_count": 3}, "blk.2.attn_norm"),
        ({"llama__block_count": 1}, "blk.1."),
        ({"split__count": 2}, "split"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = tiny_gguf(tmp_path / "bad.gguf", **changes)
    with pytest.raises(ModelFileError, match=named) as error:
        load_weights(path)
    assert str(path) in str(error.value)


def test_missing_misshapen_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    weights = random_weights()
    del weights["blk.1.attn_k.weight"]
    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_k' is missing"):
        load_weights(tiny_gguf(tmp_path / "a.gguf", weights))
    weights = random_weights()
    weights["blk.0.attn_q.weight"] = weights["blk.0.attn_q.weight"][:32]
    with pytest.raises(ModelFileError, match=r"blk\.0\.attn_q' has shape \(32, 64\)"):
        load_weights(tiny_gguf(tmp_path / "b.gguf", weights))
    with pytest.raises(ModelFileError, match=r"attn_q\.bias"):
        load_weights(
            tiny_gguf(
                tmp_path / "c.gguf", random_weights() | {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}
            )
        )


def test_unsupported_kind_is_named(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "k.gguf", metadata(), {"token_embd.weight": ("iq4_xs", (1, 256), bytes(136))}
    )
    with pytest.raises(ModelFileError, match=r"token_embd\.weight.*type number 23"):
        load_weights(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for num_bytes in [0, 3, 10, 30, 200, 5_000, len(whole) // 2, len(whole) - 200]:
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            load_weights(path)


def test_not_a_model_file(tmp_path: Path) -> None:
    path = tmp_path / "note.gguf"
    path.write_text("hello, this is no model")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        load_weights(path)
    with pytest.raises(ModelFileError, match="no such file"):
        load_weights(tmp_path / "absent.gguf")
    path.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(32))
    with pytest.raises(ModelFileError, match="version 1"):
        load_weights(path)
