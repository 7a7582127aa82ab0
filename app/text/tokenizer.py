"""Text to tokens, and each token's share of the text as bytes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.token_bytes import byte_level, sentence_piece


class TextError(ValueError):
    """Text that cannot become tokens, or a tokenizer that cannot be used; the message says why."""


class Tokenizer:
    """A model's tokenizer. `bos_token_id` is the token every prompt starts with, None where the model wants none."""

    def __init__(self, inner: tokenizers.Tokenizer, *, bos_token_id: int | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.bos_token_id = bos_token_id
        decoder = json.loads(inner.to_str())["decoder"]
        self._bytes, self.strips_first_space = _token_bytes(inner, decoder)
        # Control tokens steer the model and are no part of an answer's text.
        special = {i: t.content for i, t in inner.get_added_tokens_decoder().items() if t.special}
        self._special = frozenset(special)
        self._control = {content: i for i, content in special.items()}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._plain = tokenizers.Tokenizer.from_str(inner.to_str())
        self._plain.encode_special_tokens = True

    @classmethod
    def load(cls, path: Path, *, bos_token_id: int | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises TextError, naming the file, when it is none or of an unknown kind."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), bos_token_id=bos_token_id)
        except TextError as error:
            raise TextError(f"{path}: {error}") from None
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise TextError(f"{path}: not a usable tokenizer.json: {error}") from None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's own vocabulary may be padded beyond it."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids, control tokens recognised, starting with `bos_token_id` where the model wants one.

        Raises TextError when the text holds lone surrogates (it is not valid Unicode).
        """
        ids = self._encode(self._inner, text)
        if self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    @staticmethod
    def _encode(inner: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            ids: list[int] = inner.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise TextError("the text holds a lone surrogate, which is not valid Unicode") from None
        return ids

    def quote(self, text: str, mark: str) -> str:
        """`text` with every control token's name in it written as `mark`, its id and `mark`; see `encode_quoted`.

        `mark` must be text that nobody can have guessed, of letters and digits alone so that a template leaves it.
        """
        return self._control_text.sub(lambda found: f"{mark}{self._control[found[0]]}{mark}", text)

    def encode_quoted(self, text: str, mark: str) -> list[int]:
        """Token ids as of `encode`, but what `quote` wrote becomes the plain text that it stands for."""
        names = {str(token_id): content for content, token_id in self._control.items()}
        quoted = re.compile(f"{mark}([0-9]+){mark}")
        ids: list[int] = [] if self.bos_token_id is None else [self.bos_token_id]
        at = 0
        for found in [*self._control_text.finditer(text), None]:
            plain = quoted.sub(lambda m: names[m[1]], text[at : found.start() if found else len(text)])
            if plain:
                ids += self._encode(self._plain, plain)
            if found:
                at = found.end()
                ids.append(self._control[found[0]])
        return ids[1:] if self.bos_token_id is not None and ids[1:2] == [self.bos_token_id] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, a control token's name included; empty for ids outside the vocabulary.

        A character may be spread over several tokens: one token's bytes need not be valid UTF-8.
        """
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def text_bytes(self, token_id: int) -> bytes:
        """What the token adds to an answer: its bytes, nothing for control tokens."""
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self.text_bytes(token_id) for token_id in token_ids)
        return (data.removeprefix(b" ") if self.strips_first_space else data).decode(
            "utf-8", errors="replace"
        )


def _token_bytes(inner: tokenizers.Tokenizer, decoder: dict[str, Any] | None) -> tuple[list[bytes], bool]:
    """Every token's bytes by id, and whether the first space of a text is the tokenizer's own."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    steps = (
        decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or {"type": "none"}]
    )
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        for token, token_id in vocabulary.items():
            table[token_id] = byte_level(token)
        return table, False
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        for token, token_id in vocabulary.items():
            table[token_id] = sentence_piece(token)
        return table, "Strip" in kinds or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
        )
    raise TextError(
        f"the decoder {' + '.join(kinds)} is not supported (byte-level and SentencePiece ones are)"
    )
