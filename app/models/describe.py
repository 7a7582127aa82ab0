"""From a model file or folder to what its place in the catalogue holds beside the weights."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from app.models.entry import CHAT_TEMPLATE, MODEL_JSON, TOKENIZER_JSON, ModelEntry, ModelError
from app.models.gguf_tokenizer import adds_bos, tokenizer_from_gguf
from app.text.chat_template import ChatTemplate
from app.text.tokenizer import Tokenizer
from engine.weights import load_weights
from engine.weights.gguf import read_gguf
from engine.weights.safetensors import read_json, read_tensors, weight_files


@dataclass(frozen=True, slots=True)
class _Text:
    """What a model says of its text; `tokenizer` is the content of a tokenizer.json."""

    tokenizer: str
    chat_template: str | None
    add_bos: bool


def describe(name: str, weights: Path, folder: Path) -> ModelEntry:
    """Check the model at `weights` as a whole and write tokenizer, chat template and model.json into `folder`.

    Raises ModelFileError, TextError, ChatTemplateError or ModelError, naming what is wrong with it.
    """
    # Only here: the kernels behind it take a second to import, and a model that is here already needs none of them.
    from engine.model import check_shape

    model = load_weights(weights)
    try:
        check_shape(model.config)
    except ValueError as error:
        raise ModelError(f"{weights}: the engine cannot serve this shape: {error}") from None
    text = _folder_text(weights, model.config.bos_token_id) if weights.is_dir() else _gguf_text(weights)
    (folder / TOKENIZER_JSON).write_text(text.tokenizer, encoding="utf-8")
    tokenizer = Tokenizer.load(folder / TOKENIZER_JSON)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"{weights}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}: "
            "they do not belong together"
        )
    if text.chat_template is not None:
        ChatTemplate(text.chat_template)
        (folder / CHAT_TEMPLATE).write_text(text.chat_template, encoding="utf-8")
    if text.add_bos and model.config.bos_token_id is None:
        raise ModelError(f"{weights}: prompts should start with a bos token, but the model names none")
    entry = ModelEntry(
        id=name,
        architecture="llama",
        parameters=sum(tensor.num_elements for tensor in model.tensors.values()),
        weights_bytes=_weights_bytes(weights),
        quantization=_quantization(weights),
        path=weights,
        folder=folder,
        max_context_tokens=model.config.max_context_tokens,
        vocab_size=model.config.vocab_size,
        bos_token_id=model.config.bos_token_id,
        eos_token_ids=model.config.eos_token_ids,
        add_bos=text.add_bos,
        digest=model.digest,
    )
    (folder / MODEL_JSON).write_text(entry.to_json(), encoding="utf-8")
    return entry


def _weights_bytes(weights: Path) -> int:
    files = weight_files(weights) if weights.is_dir() else [weights]
    return sum(file.stat().st_size for file in files)


def _quantization(weights: Path) -> str:
    """The kind, as shipped, that most bytes of the weights are in."""
    tensors = read_tensors(weight_files(weights)) if weights.is_dir() else read_gguf(weights).tensors
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += tensor.data.nbytes
    return sizes.most_common(1)[0][0].upper()


def _gguf_text(path: Path) -> _Text:
    file = read_gguf(path)
    template = file.get("tokenizer.chat_template", str, "")
    return _Text(tokenizer_from_gguf(file).to_str(), template or None, adds_bos(file))


def _folder_text(folder: Path, bos_token_id: int | None) -> _Text:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{folder}: holds no tokenizer.json; save the model with its fast tokenizer")
    source = path.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.exists() else {}
    return _Text(source, _folder_template(folder, config), _folder_adds_bos(source, config, bos_token_id))


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Its own file, or an entry of tokenizer_config.json: one template, or several by name."""
    own = folder / CHAT_TEMPLATE
    if own.exists():
        return own.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _folder_adds_bos(source: str, config: dict[str, Any], bos_token_id: int | None) -> bool:
    """The tokenizer's post-processor decides in practice; `add_bos_token` only where it says nothing."""
    if bos_token_id is None:
        return False
    post_processor = json.loads(source).get("post_processor")
    if post_processor is None:
        return bool(config.get("add_bos_token", False))
    return tokenizers.Tokenizer.from_str(source).encode("a").ids[:1] == [bos_token_id]
