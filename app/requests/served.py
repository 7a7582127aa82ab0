"""A model as the gateway serves it: its text, its limits, and the KV layout that its workers announce."""

import asyncio
from dataclasses import dataclass, field
from functools import cached_property, partial

from app.errors import ContextLengthError, InvalidRequestError
from app.models.entry import ModelEntry
from app.text import ModelText, TextError

INLINE_CHARACTERS = 4096
"""Texts up to this length are tokenised on the event loop (under a millisecond); longer ones in a thread."""


def fewest_tokens(text: str) -> int:
    """What a text has at least, by its length: prose has some four characters a token, and hardly any has eight."""
    return 1 + len(text) // 8


@dataclass
class ServedModel:
    """One model of the catalogue with its text side loaded. `created`: Unix time of loading."""

    entry: ModelEntry
    text: ModelText
    created: int
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    @property
    def id(self) -> str:
        """The name clients use."""
        return self.entry.id

    @property
    def max_context_tokens(self) -> int:
        """Prompt and answer together."""
        return self.entry.max_context_tokens

    @property
    def system_fingerprint(self) -> str:
        """Changes when the weights do."""
        return f"fp_{self.entry.digest[:12]}"

    @cached_property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token: a text of more than this times the context cannot fit."""
        tokenizer = self.text.tokenizer
        return max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))

    async def tokenise(self, text: str, param: str, mark: str | None = None) -> list[int]:
        """Token ids of a prompt, in which control tokens are quoted by `mark` where somebody else wrote them.

        Raises ContextLengthError, by length alone where that is certain.
        """
        at_least = len(text) // self.longest_token_bytes
        if at_least >= self.max_context_tokens:
            raise ContextLengthError(
                f"{param}: the model's maximum context length is {self.max_context_tokens} tokens; "
                f"a text of {len(text)} characters has more than that",
                param=param,
            )
        tokenizer = self.text.tokenizer
        encode = tokenizer.encode if mark is None else partial(tokenizer.encode_quoted, mark=mark)
        try:
            if len(text) <= INLINE_CHARACTERS:
                return encode(text)
            async with self._slots:
                return await asyncio.to_thread(encode, text)
        except TextError as error:
            raise InvalidRequestError(f"{param}: {error}", param=param) from None

    def check_tokens(self, tokens: list[int], param: str) -> None:
        """Raises InvalidRequestError for ids outside the vocabulary."""
        if max(tokens) >= self.entry.vocab_size:
            raise InvalidRequestError(
                f"{param}: token ids must be below the vocabulary's size, {self.entry.vocab_size}",
                param=param,
            )

    def max_tokens(self, num_prompt_tokens: int, wanted: int | None, default: int | None, param: str) -> int:
        """How long the answer may be. Raises ContextLengthError when prompt and answer do not fit."""
        room = self.max_context_tokens - num_prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"{param}: the model's maximum context length is {self.max_context_tokens} tokens; "
                f"your prompt has {num_prompt_tokens}",
                param=param,
            )
        if wanted is None:
            return room if default is None else min(default, room)
        if wanted > room:
            raise ContextLengthError(
                f"max_tokens: the model's maximum context length is {self.max_context_tokens} tokens; "
                f"you asked for {num_prompt_tokens + wanted} "
                f"({num_prompt_tokens} in the prompt, {wanted} in the answer)",
                param="max_tokens",
            )
        return wanted
