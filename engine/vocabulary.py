"""A model's vocabulary as bytes, read from the model's own file: what grammar masks are computed over."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.token_bytes import byte_level, sentence_piece
from engine.weights.errors import ModelFileError
from engine.weights.gguf import GgufFile, read_gguf
from engine.weights.safetensors import read_json

_UNKNOWN, _CONTROL, _UNUSED = 2, 3, 5
"""GGUF's `tokenizer.ggml.token_type` of tokens that are no text."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens[i]`: bytes of token `i`, empty where it stands for none; `control`: ids that steer and are no text."""

    tokens: list[bytes]
    control: frozenset[int]


def read_vocabulary(path: Path) -> Vocabulary:
    """Of a GGUF file, or of a Hugging Face folder. Raises ModelFileError when it has none of a known kind."""
    return _from_folder(path) if path.is_dir() else _from_gguf(read_gguf(path))


def _from_gguf(file: GgufFile) -> Vocabulary:
    kinds = {"gpt2": byte_level, "llama": sentence_piece}
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in kinds:
        raise ModelFileError(
            f"{file.path}: tokenizer kind {kind!r} is not supported ({', '.join(kinds)} are)"
        )
    tokens = [kinds[kind](str(token)) for token in file.get("tokenizer.ggml.tokens", list)]
    types = file.get("tokenizer.ggml.token_type", list, [])
    control = {i for i, number in enumerate(types) if number in (_UNKNOWN, _CONTROL, _UNUSED)}
    return Vocabulary(tokens, frozenset(control))


def _from_folder(folder: Path) -> Vocabulary:
    path = folder / "tokenizer.json"
    content = read_json(path)
    model, added = content.get("model") or {}, content.get("added_tokens") or []
    ids: dict[str, int] = dict(model.get("vocab") or {})
    if not ids or model.get("type") != "BPE":
        raise ModelFileError(
            f"{path}: a tokenizer of kind {model.get('type')!r} is not supported, only BPE is"
        )
    bytes_of = _decoding(content.get("decoder") or {})
    names = {int(token["id"]): str(token["content"]) for token in added}
    tokens = [b""] * (max([*ids.values(), *names]) + 1)
    for token, token_id in ids.items():
        tokens[token_id] = bytes_of(token)
    for token_id, token in names.items():
        tokens[token_id] = token.encode()
    return Vocabulary(tokens, frozenset(int(token["id"]) for token in added if token.get("special")))


def _decoding(decoder: dict[str, Any]) -> Callable[[str], bytes]:
    steps = decoder.get("decoders", [decoder])
    return byte_level if any(step.get("type") == "ByteLevel" for step in steps) else sentence_piece
