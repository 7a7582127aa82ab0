from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.models.gguf_tokenizer import adds_bos, tokenizer_from_gguf
from app.text import ModelText, TextError, Tokenizer
from engine.weights import ModelFileError
from engine.weights.gguf import read_gguf
from tests.app.text.conftest import known_part
from tests.model_files import metadata, write_gguf

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


def test_real_model_token_ids(text: ModelText) -> None:
    assert text.chat_template is not None
    prompt = text.chat_template.render([{"role": "user", "content": "What is the capital of France?"}])
    # Ids as the model's publisher's tokenizer gives them: <|im_start|> is 1, <|im_end|> 2, newline 198.
    question = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    assert text.tokenizer.encode(prompt)[-16:] == question
    # Digits are single tokens: a space, then 2, 0, 2, 6.
    assert [text.tokenizer.token_bytes(i) for i in text.tokenizer.encode("in 2026")] == [
        b"in",
        b" ",
        *b"2 0 2 6".split(),
    ]


@given(unicode_text)
def test_encode_and_decode_give_the_text_back(text: ModelText, sample: str) -> None:
    sample = known_part(text.tokenizer, sample)
    assert text.tokenizer.decode(text.tokenizer.encode(sample)) == sample


def test_control_tokens_are_tokens_and_no_text(text: ModelText) -> None:
    ids = text.tokenizer.encode("a<|im_end|>b")
    assert 2 in ids
    assert text.tokenizer.decode(ids) == "ab"
    assert text.tokenizer.token_bytes(2) == b"<|im_end|>"
    assert text.tokenizer.token_bytes(10**9) == b""


def test_lone_surrogates_are_refused(text: ModelText) -> None:
    with pytest.raises(TextError, match="surrogate"):
        text.tokenizer.encode("bad \ud800 text")


def pieces(pre: str, text: str, tmp_path: Path) -> list[str]:
    """How a pre-tokenizer cuts text."""
    file = read_gguf(write_gguf(tmp_path / "t.gguf", metadata(tokenizer__ggml__pre=pre), {}))
    cut = tokenizer_from_gguf(file).pre_tokenizer.pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in cut]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        # gpt-2: digits together, a space joins the word, contractions apart.
        ("gpt-2", ["We", "'ll", " pay", " 12345", "€!!", "\n", "\n", "OK"]),
        # smollm: as gpt-2 with each digit alone, so that the space before them stands alone too.
        ("smollm", ["We", "'ll", " pay", " ", "1", "2", "3", "4", "5", "€!!", "\n", "\n", "OK"]),
        # llama-bpe: up to three digits, never with the space; line ends stay with punctuation.
        ("llama-bpe", ["We", "'ll", " pay", " ", "123", "45", "€!!\n\n", "OK"]),
        ("qwen2", ["We", "'ll", " pay", " ", "1", "2", "3", "4", "5", "€!!\n\n", "OK"]),
        ("tekken", ["We", "'ll", " pay", " ", "1", "2", "3", "4", "5", "€!!\n\n", "OK"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_were_trained(
    pre: str, expected: list[str], tmp_path: Path
) -> None:
    assert pieces(pre, "We'll pay 12345€!!\n\nOK", tmp_path) == expected


def test_unknown_pre_tokenizer_and_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="'deepseek-v9'.*Known: gpt-2"):
        pieces("deepseek-v9", "x", tmp_path)
    file = read_gguf(write_gguf(tmp_path / "w.gguf", metadata(tokenizer__ggml__model="bert"), {}))
    with pytest.raises(ModelFileError, match="'bert'"):
        tokenizer_from_gguf(file)


def test_bos_by_the_files_word_or_the_kinds_habit(tmp_path: Path) -> None:
    for changes, expected in [
        ({}, False),
        ({"tokenizer__ggml__add_bos_token": True}, True),
        ({"tokenizer__ggml__pre": "llama-bpe"}, True),
        ({"tokenizer__ggml__pre": "llama-bpe", "tokenizer__ggml__add_bos_token": False}, False),
    ]:
        assert adds_bos(read_gguf(write_gguf(tmp_path / "t.gguf", metadata(**changes), {}))) is expected


def test_byte_pairs_merge_in_order(tmp_path: Path) -> None:
    file = read_gguf(write_gguf(tmp_path / "t.gguf", metadata(), {}))
    tokenizer = Tokenizer(tokenizer_from_gguf(file))
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("hello wow")] == [b"hello", b" wo", b"w"]


def test_sentence_piece_joins_the_best_scored_first(sentence_piece: Tokenizer) -> None:
    def cut(text: str) -> list[bytes]:
        return [sentence_piece.token_bytes(i) for i in sentence_piece.encode(text)]

    assert cut("hello") == [b"<s>", b" hello"]
    # "w" is known, the accented letter is not: its two UTF-8 bytes stand for it.
    assert cut("wé") == [b"<s>", b" w", b"\xc3", b"\xa9"]
    # The text between control tokens gets the space as well.
    assert cut("a</s>a") == [b"<s>", b" a", b"</s>", b" a"]
    assert sentence_piece.encode("<s>a") == sentence_piece.encode("a"), "bos stands once"


@pytest.mark.parametrize("sample", ["hello wow", "hé 東京 🚀", " two  spaces ", "tab\tand\nline", ""])
def test_sentence_piece_gives_the_text_back(sentence_piece: Tokenizer, sample: str) -> None:
    assert sentence_piece.decode(sentence_piece.encode(sample)) == sample


def test_damaged_tokenizer_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TextError, match=r"tokenizer\.json: not a usable"):
        Tokenizer.load(path)
    with pytest.raises(TextError, match=r"absent\.json"):
        Tokenizer.load(tmp_path / "absent.json")
