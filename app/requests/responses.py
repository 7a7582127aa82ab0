"""A request of the Responses API in the words of a chat: its turns, its tools, and the shape of its text."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from app.api.responses_schemas import InputItem, InputPart, ResponsesRequest, ResponsesTool, TextFormat
from app.api.schemas import FunctionCall, FunctionTool, JsonSchema, Message, ResponseFormat, Tool, ToolCall
from app.errors import InvalidRequestError, UnsupportedError

T = TypeVar("T")

_TEXT_PARTS = {"text", "input_text", "output_text", "refusal"}
_NAMES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"^tools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"^response_format\.json_schema\b"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^messages$"), "input"),
    (re.compile(r"^max_tokens$"), "max_output_tokens"),
]
"""Fields that a chat calls otherwise."""


@dataclass
class Talk:
    """Turns of a chat, and where each part of them stood in the input."""

    messages: list[Message] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    """`messages[1].tool_calls[0].function` to `input[2]`."""

    def say(self, message: Message, place: str) -> None:
        """One more turn."""
        self.places[f"messages[{len(self.messages)}]"] = place
        self.messages.append(message)

    def call(self, call: ToolCall, place: str) -> None:
        """A call by the assistant: of the turn before it, if that is the assistant's."""
        if not self.messages or self.messages[-1].role != "assistant":
            self.say(Message("assistant"), place)
        last = self.messages[-1]
        calls = [*(last.tool_calls or ()), call]
        self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls) - 1}].function"] = place
        self.messages[-1] = Message(last.role, last.content, None, calls)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors from inside name the fields that the caller sent."""
        try:
            yield
        except InvalidRequestError as error:
            if error.param is None:
                raise
            param = self._name(error.param)
            if param == error.param:
                raise
            message = error.message.replace(error.param, param)
            raise type(error)(message, param=param, code=error.body.code) from None

    def _name(self, param: str) -> str:
        for theirs in sorted(self.places, key=len, reverse=True):
            if param.startswith(theirs):
                return self.places[theirs] + param.removeprefix(theirs)
        for pattern, ours in _NAMES:
            param = pattern.sub(ours, param)
        return param


def talk_of(body: ResponsesRequest) -> Talk:
    """The conversation. Raises InvalidRequestError and UnsupportedError, naming the item at fault."""
    talk = Talk()
    if body.instructions is not None:
        talk.say(Message("system", body.instructions), "instructions")
    if isinstance(body.input, str):
        talk.say(Message("user", body.input), "input")
        return talk
    if not body.input:
        raise InvalidRequestError("input: must hold at least one item", param="input")
    known: set[str] = set()
    for number, item in enumerate(body.input):
        place = f"input[{number}]"
        if item.type == "message":
            role = _needed(item.role, f"{place}.role")
            talk.say(Message(role, _text(item.content, f"{place}.content")), place)  # type: ignore[arg-type]  # of its roles
        elif item.type == "function_call":
            call = _call(item, place)
            known.add(call.id)
            talk.call(call, place)
        elif item.type == "function_call_output":
            call_id = _needed(item.call_id, f"{place}.call_id")
            if call_id not in known:
                raise InvalidRequestError(
                    f"{place}.call_id: no function_call before it has the id {call_id!r}",
                    param=f"{place}.call_id",
                )
            output = _text(item.output, f"{place}.output")
            talk.say(Message("tool", output, tool_call_id=call_id), place)
        else:
            raise UnsupportedError(
                f"{place}.type: items of type {item.type!r} are not supported, only message, function_call and "
                "function_call_output",
                param=f"{place}.type",
            )
    return talk


def tools_of(tools: Sequence[ResponsesTool]) -> list[Tool]:
    """The tools as a chat describes them. Raises InvalidRequestError."""
    described = []
    for number, tool in enumerate(tools):
        function = None
        if tool.type == "function":
            name = _needed(tool.name, f"tools[{number}].name")
            function = FunctionTool(name, tool.description, tool.parameters, tool.strict)
        described.append(Tool(tool.type, function))
    return described


def tool_choice_of(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """The choice as a chat says it. Raises UnsupportedError for tools that are not functions."""
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        named = [tool_choice_of(tool) if isinstance(tool, dict) else tool for tool in tools or ()]
        return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    raise UnsupportedError(f"tool_choice: only functions are supported, got {kind!r}", param="tool_choice")


def response_format_of(wanted: TextFormat | None) -> ResponseFormat | None:
    """The shape of the text as a chat says it. Raises InvalidRequestError."""
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return ResponseFormat(wanted.type)
    name = _needed(wanted.name, "text.format.name")
    if wanted.schema is None:
        raise _missing("text.format.schema")
    return ResponseFormat(wanted.type, JsonSchema(name, wanted.schema, wanted.description, wanted.strict))


def _call(item: InputItem, place: str) -> ToolCall:
    name = _needed(item.name, f"{place}.name")
    arguments = _needed(item.arguments, f"{place}.arguments")
    return ToolCall(_needed(item.call_id, f"{place}.call_id"), FunctionCall(name, arguments))


def _text(content: str | list[InputPart] | None, place: str) -> str:
    if isinstance(content, str):
        return content
    parts: Sequence[InputPart] = _needed(content, place)
    return "".join(_part(part, f"{place}[{number}]") for number, part in enumerate(parts))


def _part(part: InputPart, place: str) -> str:
    if part.type not in _TEXT_PARTS:
        raise UnsupportedError(
            f"{place}.type: parts of type {part.type!r} are not supported, only input_text and output_text",
            param=f"{place}.type",
        )
    if part.type == "refusal":
        return _needed(part.refusal, f"{place}.refusal")
    return _needed(part.text, f"{place}.text")


def _needed(value: T | None, param: str) -> T:
    if value is None:
        raise _missing(param)
    return value


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
