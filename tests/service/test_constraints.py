"""Answers in the shape that was asked for, from the running service with the real model, by the OpenAI package."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.service.running import Service

MODEL = "smollm2-135m"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "sights": {"type": "array", "items": {"enum": ["tower", "river", "museum"]}, "maxItems": 3},
    },
    "required": ["city", "population", "sights"],
    "additionalProperties": False,
}
ASK: Any = [{"role": "user", "content": "Describe Paris as JSON."}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}


@pytest.fixture
def sdk(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=service.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept_over_prefill_and_decode(sdk: openai.OpenAI, temperature: float) -> None:
    for seed in range(4):
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=ASK,
            response_format=FORMAT,
            temperature=temperature,
            seed=seed,
            max_tokens=200,
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_a_stream_says_the_same(sdk: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": ASK, "response_format": FORMAT, "seed": 7, "max_tokens": 200}
    whole = sdk.chat.completions.create(**fields).choices[0].message.content
    chunks = [c.choices[0] for c in sdk.chat.completions.create(**fields, stream=True) if c.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].finish_reason == "stop"


def test_an_object_a_choice_and_an_expression(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=ASK, response_format={"type": "json_object"}, temperature=0, max_tokens=300
    )
    choice = answer.choices[0]
    # At max_tokens an object may be cut, as OpenAI's.
    assert choice.finish_reason in ("stop", "length")
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)
    extras: list[tuple[dict[str, Any], set[str]]] = [
        ({"guided_choice": ["yes", "no (really)"]}, {"yes", "no (really)"}),
        ({"guided_regex": "[a-c]{3}"}, {a + b + c for a in "abc" for b in "abc" for c in "abc"}),
        ({"structured_outputs": {"choice": ["left", "right"]}}, {"left", "right"}),
    ]
    for extra, allowed in extras:
        text = sdk.completions.create(model=MODEL, prompt="It is", max_tokens=20, extra_body=extra)
        assert text.choices[0].text in allowed
