"""One model of the catalogue, as written in `model.json` of its folder: all the gateway needs without its weights."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MODEL_JSON = "model.json"
TOKENIZER_JSON = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


class ModelError(Exception):
    """A model that cannot be named, fetched, added or found; the message says which and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """`path` is the weights' file or folder; `weights_bytes` their size; `parameters` counts weights, tied ones once.

    `bos_token_id` is the beginning-of-sequence token, `add_bos` whether prompts start with it. `digest` is the hex
    SHA-256 of the weights' content.
    """

    id: str
    architecture: str
    parameters: int
    weights_bytes: int
    quantization: str
    path: Path
    folder: Path
    max_context_tokens: int
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    digest: str

    def public(self) -> dict[str, Any]:
        """What `cloudmatrix models list` shows of it."""
        return {
            "id": self.id,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "weights_bytes": self.weights_bytes,
            "quantization": self.quantization,
            "path": str(self.path),
        }

    @property
    def tokenizer_path(self) -> Path:
        """Its `tokenizer.json`."""
        return self.folder / TOKENIZER_JSON

    @property
    def chat_template(self) -> str | None:
        """Source of its chat template; None when the model has none."""
        path = self.folder / CHAT_TEMPLATE
        return path.read_text(encoding="utf-8") if path.exists() else None

    def to_json(self) -> str:
        """Content of `model.json`; `folder` is where that lies and is not written, `path` is relative inside it."""
        values = asdict(self)
        del values["folder"]
        inside = self.path.is_relative_to(self.folder)
        values["path"] = str(self.path.relative_to(self.folder) if inside else self.path)
        return json.dumps(values, indent=2)


def read_entry(folder: Path) -> ModelEntry:
    """The entry of a model's folder. Raises ModelError when it is not one."""
    path = folder / MODEL_JSON
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(ModelEntry)}
        values = {name: value for name, value in values.items() if name in known}
        values["path"] = folder / values["path"]
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return ModelEntry(folder=folder, **values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{path}: not a readable model description ({error}); remove {folder} and pull again"
        ) from None
