"""Tools of a chat: which may be called in an answer, and the grammar that calls are held to."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from app.api.schemas import FunctionTool, ResponseFormat, Sampling, Tool
from app.errors import InvalidRequestError, UnsupportedError
from app.requests.calls import CLOSES, OPENS
from app.requests.constraint import SPACING, checked, format_schema, json_grammar, shapes

MAX_CALLS = 8
"""Most calls in one answer."""
MAX_TOOLS = 128
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function that describes none."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES = "none, auto, required, or a function that tools names"


@dataclass(frozen=True, slots=True)
class Offer:
    """The functions that may be called in one answer, each with its place in the request's tools."""

    functions: dict[int, FunctionTool]
    must_call: bool
    max_calls: int


def offered(
    tools: Sequence[Tool], choice: str | dict[str, Any] | None, *, parallel: bool | None
) -> Offer | None:
    """What `tools` and `tool_choice` allow; None where nothing may be called.

    Raises InvalidRequestError and UnsupportedError, naming the field at fault.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools: at most {MAX_TOOLS}, got {len(tools)}", param="tools")
    functions = [_function(place, tool) for place, tool in enumerate(tools)]
    names: dict[str, int] = {}
    for place, function in enumerate(functions):
        if names.setdefault(function.name, place) != place:
            param = f"tools[{place}].function.name"
            raise InvalidRequestError(f"{param}: {function.name!r} is there twice", param=param)
    if choice == "none" or (choice in (None, "auto") and not tools):
        return None
    if not tools:
        raise _bad_choice("there are no tools to choose from")
    mode, allowed = _mode(choice or "auto")
    unknown = [name for name in allowed if name not in names]
    if unknown:
        raise _bad_choice(f"tools names no function {unknown[0]!r}")
    places = [names[name] for name in allowed] or range(len(tools))
    is_named = isinstance(choice, dict) and mode == "named"
    max_calls = 1 if parallel is False or is_named else MAX_CALLS
    return Offer({place: functions[place] for place in places}, mode != "auto", max_calls)


async def tool_grammar(offer: Offer, request: Sampling, response_format: ResponseFormat | None) -> str:
    """The grammar of an answer that may, or must, hold calls; other text keeps to `response_format`.

    A value in the arguments that the schema does not bound may grow until the answer's tokens are used up.
    Raises InvalidRequestError naming the schema that cannot be served, or a field that tools cannot go with.
    """
    for name in shapes(request, None):
        raise InvalidRequestError(f"{name}: cannot go with tools; use response_format", param=name)
    rules = []
    for place, function in offer.functions.items():
        shape = await _shape(place, function)
        head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
        rules.append(
            f"call{place}: {head} args{place} {json.dumps('}' + CLOSES)}\nargs{place}: %json {shape}"
        )
    opens = json.dumps(OPENS)
    if offer.must_call:
        start = f"start: {opens} call more"
    elif response_format is None or response_format.type == "text":
        start = f"start: TEXT | opening call more\nopening[lazy]: TEXT {opens}\nTEXT: /(.|\\n)*/"
    else:
        schema, exact, _ = format_schema(response_format)
        start = f"start: content | {opens} call more\ncontent: %json {_described(schema, exact=exact)}"
    calls = " | ".join(f"call{place}" for place in offer.functions)
    more = f"more: next{{0,{offer.max_calls - 1}}}\nnext: {opens} call" if offer.max_calls > 1 else 'more: ""'
    grammar = "\n".join([start, more, f"call: {calls}", *rules])
    return await checked(LLMatcher.grammar_from_lark(grammar), "tools")


async def _shape(place: int, function: FunctionTool) -> str:
    param = f"tools[{place}].function.parameters"
    schema = function.parameters if function.parameters is not None else NO_PARAMETERS
    if schema.get("type", "object") != "object":
        raise InvalidRequestError(f"{param}: expected a schema of type object", param=param)
    schema, exact = {**schema, "type": "object"}, bool(function.strict)
    try:
        grammar = json_grammar(schema, exact=exact)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{param}: cannot be served: {error}", param=param, code="invalid_schema"
        ) from None
    await checked(grammar, param)
    return _described(schema, exact=exact)


def _described(schema: dict[str, Any] | bool, *, exact: bool) -> str:
    """A schema inside a grammar, with the one spacing that everything is written in."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return json.dumps({"x-guidance": {**SPACING, "lenient": not exact}, **schema})


def _function(place: int, tool: Tool) -> FunctionTool:
    if tool.type != "function":
        raise UnsupportedError(
            f"tools[{place}].type: only function is supported, got {tool.type!r}",
            param=f"tools[{place}].type",
        )
    if tool.function is None:
        param = f"tools[{place}].function"
        raise InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
    if not _NAME.fullmatch(tool.function.name):
        param = f"tools[{place}].function.name"
        raise InvalidRequestError(f"{param}: expected 1 to 64 letters, digits, _ and -", param=param)
    return tool.function


def _mode(choice: str | dict[str, Any]) -> tuple[str, list[str]]:
    """auto, required or named, and the functions it is limited to (none: all)."""
    if isinstance(choice, str):
        if choice not in ("auto", "required"):
            raise _bad_choice(f"expected {_CHOICES}")
        return choice, []
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        mode, tools = (
            (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
        )
        if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
            raise _bad_choice("allowed_tools needs a mode, auto or required, and tools")
        return mode, [_function_name(tool) for tool in tools]
    return "named", [_function_name(choice)]


def _function_name(choice: Any) -> str:
    function = (
        choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    )
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _bad_choice(f"expected {_CHOICES}")
    return name


def _bad_choice(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"tool_choice: {what}", param="tool_choice")
