"""Small model files for tests: a random Llama as GGUF, written here byte by byte, independent of the reader."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, CONTEXT = 64, 2, 1, 32, 96, 2, 256

Weights = dict[str, NDArray[np.float32]]

TYPE_NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q6_k": 14, "iq4_xs": 23}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokens() -> list[str]:
    """The 256 characters of byte-level BPE, in order of byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


TOKENS = [*SPECIAL, *byte_tokens(), "he", "ll", "hell", "hello", "Ġw", "Ġwo"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o"]
VOCAB = len(TOKENS)


def random_weights(seed: int = 0) -> Weights:
    """Weights under GGUF names, Q and K in interleaved order."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)

    weights = {"token_embd.weight": matrix(VOCAB, HIDDEN), "output_norm.weight": norm()}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        weights |= {
            prefix + "attn_norm.weight": norm(),
            prefix + "attn_q.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            prefix + "attn_k.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "attn_v.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "attn_output.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            prefix + "ffn_norm.weight": norm(),
            prefix + "ffn_gate.weight": matrix(INNER, HIDDEN),
            prefix + "ffn_up.weight": matrix(INNER, HIDDEN),
            prefix + "ffn_down.weight": matrix(HIDDEN, INNER),
        }
    return weights


def metadata(**changes: Any) -> dict[str, Any]:
    """A whole set of GGUF metadata; a change to None leaves the key out ("." in keys is written "__")."""
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (VOCAB - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    for key, value in changes.items():
        values[key.replace("__", ".")] = value
    return {key: value for key, value in values.items() if value is not None}


def write_gguf(
    path: Path, meta: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> Path:
    """GGUF version 3: header, metadata, tensor list (columns first), padding to 32, data padded to 32 each."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, value in meta.items():
        head += _string(key) + _value(value)
    offset = 0
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", TYPE_NUMBERS[kind], offset)
        padded = data + bytes(-len(data) % 32)
        body += padded
        offset += len(padded)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def tiny_gguf(path: Path, weights: Weights | None = None, **changes: Any) -> Path:
    """The tiny model in F32."""
    weights = weights if weights is not None else random_weights()
    tensors = {name: ("f32", value.shape, value.tobytes()) for name, value in weights.items()}
    return write_gguf(path, metadata(**changes), tensors)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    kinds: list[tuple[type, int, str]] = [(bool, 7, "<?"), (int, 4, "<I"), (float, 6, "<f")]
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        items = [_value(item) for item in value]
        number = items[0][:4] if items else struct.pack("<I", 4)
        return struct.pack("<I", 9) + number + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    number, pattern = next((n, p) for kind, n, p in kinds if isinstance(value, kind))
    return struct.pack("<I", number) + struct.pack(pattern, value)
