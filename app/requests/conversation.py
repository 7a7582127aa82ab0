"""A conversation as the prompt that its model was trained on: turns, tools, and what tools said."""

import asyncio
import json
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from app.api.schemas import ContentPart, FunctionTool, Message, ToolCall
from app.errors import InvalidRequestError, UnsupportedError
from app.requests.calls import CLOSES, OPENS
from app.requests.served import ServedModel
from app.text import ChatTemplateError

INLINE_CHARACTERS = 65536
"""Conversations up to this length are rendered on the event loop, longer ones in a thread."""
_LETTERS = str.maketrans("0123456789", "ghijklmnop")
"""A mark of letters only, so that the number between two marks ends where the second begins."""


async def prompt_tokens(
    model: ServedModel, messages: Sequence[Message], functions: Sequence[FunctionTool] = ()
) -> list[int]:
    """The prompt of a conversation in which `functions` may be called. A control token's name inside it is text.

    Where the model's template knows the form of calls that answers are held to, it tells of the functions; else the
    system message does. Raises InvalidRequestError naming the message at fault.
    """
    if not messages:
        raise InvalidRequestError("messages: must hold at least one message", param="messages")
    template = model.text.chat_template
    if template is None:
        raise UnsupportedError(
            f"{model.id} has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    native = template.knows_calls
    turns = [_turn(place, message, native=native) for place, message in enumerate(messages)]
    tools = None
    if functions and native:
        tools = [{"type": "function", "function": _plain(function)} for function in functions]
    elif functions:
        turns = _told(turns, functions)
    mark = secrets.token_hex(8).translate(_LETTERS)
    quote = model.text.tokenizer.quote
    quoted = [_quoted(turn, lambda text: quote(text, mark)) for turn in turns]
    quoted_tools = _quoted(tools, lambda text: quote(text, mark))
    try:
        if sum(len(turn["content"] or "") for turn in quoted) < INLINE_CHARACTERS:
            text = template.render(quoted, tools=quoted_tools)
        else:
            text = await asyncio.to_thread(template.render, quoted, tools=quoted_tools)
    except ChatTemplateError as error:
        raise InvalidRequestError(str(error), param="messages") from None
    return await model.tokenise(text, "messages", None if (quoted, quoted_tools) == (turns, tools) else mark)


def _turn(place: int, message: Message, *, native: bool) -> dict[str, Any]:
    path = f"messages[{place}]"
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequestError(
            f"{path}.tool_calls: only the assistant calls tools", param=f"{path}.tool_calls"
        )
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequestError(
            f"{path}.tool_call_id is required with role tool",
            param=f"{path}.tool_call_id",
            code="missing_required_parameter",
        )
    content = _text(path, message)
    calls = [_call(f"{path}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls or ())]
    if native:
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if calls:
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    elif message.role == "tool":
        turn = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    else:
        turn = {"role": message.role, "content": content + "".join(map(_written, calls))}
    if message.role == "developer":
        turn["role"] = "system"
    return turn


def _text(path: str, message: Message) -> str:
    if message.content is None:
        if message.tool_calls:
            return ""
        raise InvalidRequestError(
            f"{path}.content: expected a string or text parts, got null", param=f"{path}.content"
        )
    if isinstance(message.content, str):
        return message.content
    return "".join(_part_text(f"{path}.content[{i}]", part) for i, part in enumerate(message.content))


def _part_text(path: str, part: ContentPart) -> str:
    if part.type not in ("text", "refusal"):
        raise UnsupportedError(
            f"{path}: parts of type {part.type!r} are not supported, only text", param=f"{path}.type"
        )
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise InvalidRequestError(f"{path}.{part.type} is required", param=f"{path}.{part.type}")
    return text


def _call(path: str, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        path = f"{path}.function.arguments"
        raise InvalidRequestError(f"{path}: expected the text of a JSON object", param=path) from None
    return {"name": call.function.name, "arguments": arguments}


def _written(call: dict[str, Any]) -> str:
    """A call of an earlier turn in the form in which answers make them."""
    return f"{OPENS}{json.dumps(call, ensure_ascii=False)}{CLOSES}"


def _told(turns: list[dict[str, Any]], functions: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    """The turns with the functions told of in the system message, which is made where there is none."""
    section = "\n".join(
        [
            "You can call these functions, one JSON description a line:",
            *(json.dumps(_plain(function), ensure_ascii=False) for function in functions),
            f'To call one, answer with {OPENS}{{"name": "its name", "arguments": {{…}}}}{CLOSES} alone.',
            "What it returned comes back between <tool_response> and </tool_response>.",
            "Otherwise answer in plain text.",
        ]
    )
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{section}"}, *turns[1:]]
    return [{"role": "system", "content": section}, *turns]


def _plain(function: FunctionTool) -> dict[str, Any]:
    """A function as templates expect it, without what was not said."""
    plain: dict[str, Any] = msgspec.to_builtins(function)
    return {name: value for name, value in plain.items() if value is not None and name != "strict"}


def _quoted(value: Any, quote: Any) -> Any:
    """The value with every string in it quoted."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return [_quoted(one, quote) for one in value]
    if isinstance(value, dict):
        return {quote(name): _quoted(one, quote) for name, one in value.items()}
    return value
