"""What a completion says of its prompt: its text before the answer, and the log-probabilities of its tokens."""

import codecs
from collections.abc import Mapping
from dataclasses import dataclass

from app.api.schemas import ChosenLogprob, CompletionLogprobs, PromptLogprob
from app.text import Tokenizer
from engine.protocol import TokenLogprob


class CompletionOffsets:
    """Characters of the text before each token, where tokens may be parts of characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def before(self, data: bytes) -> int:
        """The characters that are whole before the token of these bytes, which is the next one."""
        offset = self._num_characters
        self._num_characters += len(self._decoder.decode(data))
        return offset


@dataclass(frozen=True)
class Echo:
    """A prompt as an answer repeats it. `num_top`: alternatives wanted of each token; None: no log-probabilities."""

    text: str
    token_ids: list[int]
    num_top: int | None


def echoed_logprobs(
    echo: Echo, scores: Mapping[int, TokenLogprob], tokenizer: Tokenizer, offsets: CompletionOffsets
) -> CompletionLogprobs:
    """The prompt's part of the log-probabilities; null for its first token. Raises KeyError for one not scored."""
    described = CompletionLogprobs([], [], [], [])
    for place, token_id in enumerate(echo.token_ids):
        score = scores[place] if place else None
        described.tokens.append(_text(tokenizer, token_id))
        described.token_logprobs.append(None if score is None else score.logprob)
        described.top_logprobs.append(
            None
            if score is None
            else {_text(tokenizer, top): value for top, value in score.top[: echo.num_top or 0]}
        )
        described.text_offset.append(offsets.before(tokenizer.token_bytes(token_id)))
    return described


def completion_logprobs(content: list[ChosenLogprob], offsets: CompletionOffsets) -> CompletionLogprobs:
    """An answer's part, in the older shape: parallel lists."""
    return CompletionLogprobs(
        [entry.token for entry in content],
        [entry.logprob for entry in content],
        [{top.token: top.logprob for top in entry.top_logprobs} for entry in content],
        [offsets.before(bytes(entry.bytes)) for entry in content],
    )


def joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """One after the other."""
    if first is None or second is None:
        return first or second
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def prompt_logprobs(
    token_ids: list[int], scores: Mapping[int, TokenLogprob], num_top: int, tokenizer: Tokenizer
) -> list[dict[str, PromptLogprob] | None]:
    """In vLLM's shape: for each place the `num_top` likeliest tokens and the prompt's own; null for the first."""
    described: list[dict[str, PromptLogprob] | None] = [None]
    for place in range(1, len(token_ids)):
        score = scores[place]
        entries = {
            str(token_id): PromptLogprob(value, rank, _text(tokenizer, token_id))
            for rank, (token_id, value) in enumerate(score.top[:num_top], 1)
        }
        rank = next((rank for rank, (top, _) in enumerate(score.top, 1) if top == score.token_id), None)
        own = PromptLogprob(score.logprob, rank, _text(tokenizer, score.token_id))
        described.append({str(score.token_id): own, **entries})
    return described


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
