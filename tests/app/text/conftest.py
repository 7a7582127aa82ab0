from pathlib import Path

import pytest

from app.models import catalogue
from app.models.entry import ModelEntry
from app.models.gguf_tokenizer import tokenizer_from_gguf
from app.text import ModelText, Tokenizer, load_text
from engine.weights.gguf import read_gguf
from tests.model_files import metadata, write_gguf


@pytest.fixture(scope="session")
def entry() -> ModelEntry:
    return catalogue.pull(catalogue.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def text(entry: ModelEntry) -> ModelText:
    return load_text(entry)


SPM_TOKENS = (
    ["<unk>", "<s>", "</s>"]
    + [f"<0x{byte:02X}>" for byte in range(256)]
    + ["▁", "a", "b", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "▁w", "▁a"]
)
SPM_SCORES = (
    [0.0] * 259
    + [-float(i) for i in range(1, 8)]
    + [-100.0]
    + [-20.0, -21.0, -19.0, -18.0, -17.0, -22.0, -23.0]
)


@pytest.fixture
def sentence_piece(tmp_path: Path) -> Tokenizer:
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM_TOKENS,
        "tokenizer.ggml.scores": SPM_SCORES,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 15,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    meta = {
        key: value for key, value in metadata().items() if key not in ("tokenizer.ggml.merges",)
    } | changes
    file = read_gguf(write_gguf(tmp_path / "spm.gguf", meta, {}))
    return Tokenizer(tokenizer_from_gguf(file), bos_token_id=1)


def known_part(tokenizer: Tokenizer, sample: str) -> str:
    """The characters whose bytes are all in the vocabulary: the default model's lacks some bytes (control
    characters, first bytes of unassigned planes), which its tokenizer leaves out by design."""
    known = {data[0] for i in range(tokenizer.vocab_size) if len(data := tokenizer.token_bytes(i)) == 1}
    return "".join(char for char in sample if set(char.encode()) <= known)
