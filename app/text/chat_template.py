"""A model's chat template: messages to the prompt text the model was trained on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template is faulty, or refuses these messages (roles out of order, for one)."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; for a prompt it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja2 template run in a sandbox, with the helpers that templates of published models expect."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
        self.knows_calls = "<tool_call>" in source and "tools" in source
        """It tells a model of tools, and to call them as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the model's chat template is faulty at line {error.lineno}: {error}"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt. `variables` are further values a template may read (`enable_thinking`, …).

        Raises ChatTemplateError with the template's own words when it refuses the messages.
        """
        values = {**self._special, **variables, "messages": messages, "tools": tools}
        try:
            return self._template.render(values, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise ChatTemplateError(
                f"the model's chat template refuses these messages: {error.message}"
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ChatTemplateError(
                f"the model's chat template cannot take these messages: {error}"
            ) from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
