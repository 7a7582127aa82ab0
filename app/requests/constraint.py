"""From what a client says of its answer's shape to the grammar that workers hold it to."""

import asyncio
import re
from collections import OrderedDict
from typing import Any

import msgspec
from llguidance import LLMatcher

from app.api.schemas import JsonSchema, ResponseFormat, Sampling
from app.errors import InvalidRequestError
from engine.grammar import GrammarError, check_grammar

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write a value: a model that may put white space anywhere may do so until its tokens are used up."""
_MAX_KNOWN = 256
_known: "OrderedDict[str, None]" = OrderedDict()
"""Grammars found good lately."""


async def constraint(request: Sampling, response_format: ResponseFormat | None) -> str | None:
    """The grammar of a request's answer, checked; None where it is free.

    Raises InvalidRequestError naming the field whose schema, expression or grammar cannot be served, or that two
    fields contradict each other.
    """
    given = shapes(request, response_format)
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)}: give one of them", param=next(iter(given)))
    ((name, value),) = given.items()
    if isinstance(value, ResponseFormat):
        return await _response_format(value)
    kind = re.split("[_.]", name)[-1]
    try:
        grammar = _grammar(kind, value)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(name, error) from None
    return await checked(grammar, name)


def shapes(request: Sampling, response_format: ResponseFormat | None) -> dict[str, Any]:
    """The fields that say what shape an answer has, by name."""
    given = {
        name: value
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        if (value := getattr(request, name)) is not None
    }
    outputs = request.structured_outputs
    if outputs is not None:
        given |= {
            f"structured_outputs.{name}": value
            for name in ("json", "regex", "choice", "grammar")
            if (value := getattr(outputs, name)) is not None
        }
    if response_format is not None and response_format.type != "text":
        given["response_format"] = response_format
    return given


async def checked(grammar: str, param: str) -> str:
    """The grammar, if workers can follow it. Raises InvalidRequestError naming `param`."""
    if grammar not in _known:
        try:
            await asyncio.to_thread(check_grammar, grammar)
        except GrammarError as error:
            raise _refused(param, error) from None
        _known[grammar] = None
        if len(_known) > _MAX_KNOWN:
            _known.popitem(last=False)
    return grammar


def json_grammar(schema: dict[str, Any] | bool | str, *, exact: bool) -> str:
    """The grammar of a JSON value. Unless `exact`, keywords that a grammar cannot express are left out of account.

    Raises ValueError when `schema` is none.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options: Any = {**SPACING, "lenient": not exact}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)


def format_schema(wanted: ResponseFormat) -> tuple[dict[str, Any] | bool, bool, str]:
    """A JSON answer's schema, whether it counts exactly, and the field that has it. Raises InvalidRequestError."""
    if wanted.type == "json_object":
        return {"type": "object"}, True, "response_format"
    described: JsonSchema | None = wanted.json_schema
    if described is None:
        raise InvalidRequestError(
            "response_format.json_schema is required with type json_schema",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    schema = described.schema if described.schema is not None else {"type": "object"}
    return schema, bool(described.strict), "response_format.json_schema.schema"


async def _response_format(wanted: ResponseFormat) -> str:
    schema, exact, param = format_schema(wanted)
    try:
        grammar = json_grammar(schema, exact=exact)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(param, error) from None
    return await checked(grammar, param)


def _grammar(kind: str, value: Any) -> str:
    if kind == "json" and isinstance(value, dict | str):
        if isinstance(value, str) and not isinstance(msgspec.json.decode(value), dict):
            raise ValueError("expected a JSON schema")
        return json_grammar(value, exact=True)
    if kind == "regex" and isinstance(value, str):
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return LLMatcher.grammar_from_regex("|".join(re.escape(one) for one in value))
    if kind == "grammar" and isinstance(value, str):
        return LLMatcher.grammar_from_lark(value)
    expected = {"json": "a schema", "choice": "a list of strings"}.get(kind, "a string")
    raise ValueError(f"expected {expected}")


def _refused(param: str, error: Exception) -> InvalidRequestError:
    text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InvalidRequestError(f"{param}: cannot be served: {text}", param=param, code="invalid_schema")
