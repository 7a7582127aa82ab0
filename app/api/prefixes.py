"""A prefix of prompts as an operator gives it, a text or the messages that conversations begin with, in tokens."""

import re
from collections.abc import Sequence
from itertools import takewhile

import msgspec

from app.api.schemas import Message
from app.errors import InvalidRequestError
from app.requests.conversation import prompt_tokens
from app.requests.served import ServedModel

PREFIX_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What shared and pinned prefixes may be called."""


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    """Either `prompt`, a text, or `messages`, with which conversations begin. `model` may be left out."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


async def prefix_tokens(model: ServedModel, prefix: Prefix) -> list[int]:
    """The tokens with which every prompt begins that begins with `prefix`. Raises InvalidRequestError."""
    if (prefix.prompt is None) == (prefix.messages is None):
        raise InvalidRequestError("prompt: give either prompt or messages", param="prompt")
    if prefix.prompt is not None:
        return await model.tokenise(prefix.prompt, "prompt")
    # Whatever a template puts between and behind messages, two conversations that go on differently show it.
    first, second = [
        await prompt_tokens(model, _followed_by(prefix.messages or [], turn)) for turn in ("a", "b")
    ]
    return [mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def _followed_by(messages: Sequence[Message], turn: str) -> list[Message]:
    return [*messages, Message(role="user", content=turn)]
