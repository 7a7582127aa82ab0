"""What an unmodified `openai` package must get from a running service: one function a case, for every major version.

Needs nothing but the package itself, so that it also runs in an environment of its own: `python cases.py ACCESS.json`
prints one JSON line a case. `cases.mjs` has the same cases, by the same names, for the package of npm.
"""

import asyncio
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from pydantic import BaseModel

Case = Callable[["Access"], None]
CASES: dict[str, Case] = {}
ASK: Any = [{"role": "user", "content": "Describe Paris in a few words."}]
CITY_SCHEMA: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Access:
    """Where the service is, and keys of four kinds: an operator's, and such as run into 403, 429 and a short minute."""

    def __init__(self, url: str, model: str, keys: dict[str, str]) -> None:
        self.url, self.model, self.keys = url, model, keys

    def options(self, key: str = "operator", **more: Any) -> dict[str, Any]:
        return {
            "base_url": self.url + "/v1",
            "api_key": self.keys[key],
            "max_retries": 0,
            "timeout": 60,
            **more,
        }

    @contextmanager
    def sdk(self, key: str = "operator", **more: Any) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(**self.options(key, **more)) as client:
            yield client

    def get(self, path: str) -> Any:
        """A page of the service's own API, which the package does not know."""
        request = urllib.request.Request(self.url + path)
        request.add_header("authorization", f"Bearer {self.keys['operator']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@contextmanager
def raises(kind: type[openai.OpenAIError]) -> Iterator[list[Any]]:
    """Exactly this class; the exception is put into the list."""
    caught: list[Any] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    assert [type(error) for error in caught] == [kind]


@case
def chat(access: Access) -> None:
    with access.sdk() as sdk:
        answer = sdk.chat.completions.create(
            model=access.model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
        )
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert "Paris" in (choice.message.content or "")
    assert (choice.finish_reason, choice.message.role, choice.message.tool_calls) == (
        "stop",
        "assistant",
        None,
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer._request_id


@case
def chat_stream_with_usage(access: Access) -> None:
    fields: Any = {"model": access.model, "messages": ASK, "temperature": 0.8, "seed": 3}
    with access.sdk() as sdk:
        whole = sdk.chat.completions.create(**fields)
        chunks = list(
            sdk.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        )
        plain = list(sdk.chat.completions.create(**fields, stream=True))
    *parts, last = chunks
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in parts) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in parts if c.choices[0].finish_reason] == ["stop"]
    assert all(c.usage is None for c in parts)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    counts = [(u.prompt_tokens, u.completion_tokens) for u in (last.usage, whole.usage)]
    assert counts[0] == counts[1]
    assert all(c.usage is None and c.choices for c in plain)


@case
def chat_n_and_seed(access: Access) -> None:
    def say(seed: int) -> list[Any]:
        answer = sdk.chat.completions.create(
            model=access.model, messages=ASK, n=3, seed=seed, temperature=1.2, max_tokens=12
        )
        assert [c.index for c in answer.choices] == [0, 1, 2]
        return [c.message.content for c in answer.choices]

    with access.sdk() as sdk:
        first = say(5)
        assert len(set(first)) == 3
        assert say(5) == first
        assert say(6) != first


@case
def stop_strings(access: Access) -> None:
    fields: Any = {"model": access.model, "prompt": "1, 2, 3, 4, 5,", "temperature": 0, "max_tokens": 40}
    with access.sdk() as sdk:
        free = sdk.completions.create(**fields).choices[0].text
        stop = free[9:12]
        held = sdk.completions.create(**fields, stop=["never this", stop]).choices[0]
        chunks = list(sdk.completions.create(**fields, stop=stop, stream=True))
    assert held.finish_reason == "stop"
    assert held.text == free[: free.index(stop)]
    assert "".join(c.choices[0].text for c in chunks) == held.text
    assert chunks[-1].choices[0].finish_reason == "stop"


@case
def chat_logprobs(access: Access) -> None:
    with access.sdk() as sdk:
        answer = sdk.chat.completions.create(
            model=access.model, messages=ASK, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6
        )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert len(content) == answer.usage.completion_tokens  # type: ignore[union-attr]  # asserted by use
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        # At temperature 0 the token is the likeliest one.
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, tops[0])
        assert bytes(entry.bytes or []).decode() == entry.token


@case
def logit_bias_and_penalties(access: Access) -> None:
    fields: Any = {"model": access.model, "prompt": "the the the the", "temperature": 0, "max_tokens": 12}
    with access.sdk() as sdk:
        forced = sdk.completions.create(**fields, logit_bias={"500": 100})
        free = sdk.completions.create(**fields, logprobs=0)
        punished = sdk.completions.create(**fields, frequency_penalty=2, presence_penalty=2, logprobs=0)
    words = [c.logprobs.tokens for c in (free.choices[0], punished.choices[0])]  # type: ignore[union-attr]
    assert len(set(words[1] or [])) > len(set(words[0] or []))
    # A bias of 100 leaves no other token a chance.
    assert forced.choices[0].text == forced.choices[0].text[: len(forced.choices[0].text) // 12] * 12


@case
def chat_json_object(access: Access) -> None:
    with access.sdk() as sdk:
        answer = sdk.chat.completions.create(
            model=access.model,
            messages=[{"role": "user", "content": "Give me a small JSON object."}],
            response_format={"type": "json_object"},
            temperature=0,
            max_tokens=200,
        )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    # At max_tokens an object may be cut, as OpenAI's.
    assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


@case
def chat_json_schema(access: Access) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": CITY_SCHEMA}}
    with access.sdk() as sdk:
        answer = sdk.chat.completions.create(
            model=access.model, messages=ASK, response_format=wanted, temperature=1, seed=1, max_tokens=100
        )
    value = json.loads(answer.choices[0].message.content or "")
    assert sorted(value) == ["city", "population"]
    assert isinstance(value["city"], str)
    assert 0 <= value["population"] <= 99_999_999


@case
def chat_parse_into_a_model(access: Access) -> None:
    class Answer(BaseModel):
        is_city: bool
        size: int | None

    with access.sdk() as sdk:
        answer = sdk.chat.completions.parse(
            model=access.model, messages=ASK, response_format=Answer, temperature=0, max_tokens=100
        )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Answer)


@case
def chat_stream_helper(access: Access) -> None:
    fields: Any = {"model": access.model, "messages": ASK, "temperature": 0}
    with access.sdk() as sdk:
        whole = sdk.chat.completions.create(**fields).choices[0].message.content
        with sdk.chat.completions.stream(**fields) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
    assert final.choices[0].message.content == whole
    assert kinds.count("content.delta") >= 8
    assert kinds.count("content.done") == 1


@case
def chat_tools_whole(access: Access) -> None:
    fields: Any = {
        "model": access.model,
        "messages": ASK,
        "tools": [WEATHER],
        "temperature": 0,
        "max_tokens": 120,
    }
    named = {"type": "function", "function": {"name": "get_weather"}}
    with access.sdk() as sdk:
        for choice in ("required", named):
            answer = sdk.chat.completions.create(**fields, tool_choice=choice, parallel_tool_calls=False)
            (call,) = answer.choices[0].message.tool_calls or []
            assert answer.choices[0].finish_reason == "tool_calls"
            assert call.type == "function"
            assert call.function.name == "get_weather"
            assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
        none = sdk.chat.completions.create(**fields, tool_choice="none").choices[0]
        auto = sdk.chat.completions.create(**fields, tool_choice="auto").choices[0]
    assert none.message.tool_calls is None
    assert none.message.content
    assert auto.message.content or auto.message.tool_calls


@case
def chat_tools_streamed(access: Access) -> None:
    fields: Any = {
        "model": access.model,
        "messages": ASK,
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 120,
    }
    with access.sdk() as sdk:
        (whole,) = sdk.chat.completions.create(**fields).choices[0].message.tool_calls or []
        chunks = list(sdk.chat.completions.create(**fields, stream=True))
        with sdk.chat.completions.stream(**fields) as stream:
            for _event in stream:
                pass
            (gathered,) = stream.get_final_completion().choices[0].message.tool_calls or []
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0}
    assert [d.function.name for d in deltas if d.function and d.function.name] == ["get_weather"]
    assert len([d.id for d in deltas if d.id]) == 1
    assert "".join(d.function.arguments or "" for d in deltas if d.function) == whole.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert gathered.function.arguments == whole.function.arguments
    # The helper parses the arguments of a strict tool.
    assert gathered.function.parsed_arguments == json.loads(whole.function.arguments)


@case
def chat_tool_turn_back(access: Access) -> None:
    fields: Any = {"model": access.model, "tools": [WEATHER], "temperature": 0, "max_tokens": 60}
    with access.sdk() as sdk:
        asked = sdk.chat.completions.create(**fields, messages=ASK, tool_choice="required").choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "blue"}'}
            for call in asked.tool_calls or []
        ]
        assert results
        told = sdk.chat.completions.create(**fields, messages=[*ASK, asked, *results], tool_choice="none")
    assert told.choices[0].message.content


@case
def responses_whole(access: Access) -> None:
    with access.sdk() as sdk:
        answer = sdk.responses.create(
            model=access.model,
            instructions="Answer in one sentence.",
            input="What is the capital of France?",
            temperature=0,
        )
        turns: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": "Say a word."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Word.", "annotations": []}]},
            {"role": "user", "content": "Another."},
        ]
        cut = sdk.responses.create(model=access.model, input=turns, max_output_tokens=1)
    assert (answer.object, answer.status, answer.error) == ("response", "completed", None)
    assert "Paris" in answer.output_text
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.input_tokens_details.cached_tokens >= 0
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage is not None
    assert cut.usage.output_tokens == 1


@case
def responses_stream(access: Access) -> None:
    fields: Any = {"model": access.model, "input": ASK, "temperature": 0}
    with access.sdk() as sdk:
        whole = sdk.responses.create(**fields)
        events: list[Any] = list(sdk.responses.create(**fields, stream=True))
        with sdk.responses.stream(**fields) as stream:
            for _event in stream:
                pass
            final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == final.output_text
    assert whole.usage is not None
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


@case
def responses_parse_into_a_model(access: Access) -> None:
    class Answer(BaseModel):
        is_city: bool
        size: int | None

    with access.sdk() as sdk:
        answer = sdk.responses.parse(
            model=access.model, input=ASK, text_format=Answer, temperature=0, max_output_tokens=100
        )
    assert isinstance(answer.output_parsed, Answer)


@case
def responses_tool_round_trip(access: Access) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    fields: Any = {"model": access.model, "tools": [tool], "temperature": 0, "max_output_tokens": 120}
    must: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    with access.sdk() as sdk:
        asked = sdk.responses.create(**fields, **must, input=ASK)
        events: list[Any] = list(sdk.responses.create(**fields, **must, input=ASK, stream=True))
        (call,) = asked.output
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "blue"}'}
        told = sdk.responses.create(**fields, input=[*ASK, call, result], tool_choice="none")
    assert (call.name, call.status) == ("get_weather", "completed")
    assert json.loads(call.arguments)["unit"] in ("celsius", "fahrenheit")
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    assert events[-1].response.output[0].name == "get_weather"
    assert told.output_text


@case
def responses_refuse_by_name(access: Access) -> None:
    fields: Any = {"model": access.model, "input": "a"}
    with access.sdk() as sdk:
        for more, param in (
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"store": True}, "store"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"background": True, "stream": True}, "background"),
        ):
            with raises(openai.BadRequestError) as caught:
                sdk.responses.create(**fields, **more)
            assert (caught[0].code, caught[0].param) == ("unsupported_parameter", param)


@case
def completions_whole(access: Access) -> None:
    with access.sdk() as sdk:
        answer = sdk.completions.create(
            model=access.model,
            prompt=["Once upon", "In the beginning"],
            n=2,
            seed=1,
            max_tokens=5,
            logprobs=2,
        )
        ids = sdk.completions.create(model=access.model, prompt=[100, 200, 300], max_tokens=3)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert all(len(tops) >= 2 for tops in choice.logprobs.top_logprobs or [])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


@case
def completions_stream(access: Access) -> None:
    fields: Any = {"model": access.model, "prompt": "Once upon a time", "seed": 2, "max_tokens": 20}
    with access.sdk() as sdk:
        whole = sdk.completions.create(**fields)
        chunks = list(sdk.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


@case
def one_token(access: Access) -> None:
    with access.sdk() as sdk:
        for limit in ({"max_tokens": 1}, {"max_completion_tokens": 1}):
            fields: Any = {"model": access.model, "messages": ASK, **limit}
            answer = sdk.chat.completions.create(**fields)
            chunks = list(
                sdk.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 1
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 1


@case
def prompt_logprobs_leave_the_service_up(access: Access) -> None:
    with access.sdk() as sdk:
        fields: Any = {"model": access.model, "prompt": "One two three", "max_tokens": 3}
        scored: Any = sdk.completions.create(**fields, extra_body={"prompt_logprobs": 2}).choices[0]
        tokens = scored.prompt_logprobs
        assert tokens[0] is None
        assert len(tokens) == 3
        for place in tokens[1:]:
            # The two likeliest, and the prompt's own where it is neither.
            assert len(place) in (2, 3)
            assert {entry["rank"] for entry in place.values()} >= {1, 2}
            assert all(entry["logprob"] <= 0 for entry in place.values())
        usage = sdk.completions.create(**fields).usage
    assert usage is not None
    assert usage.completion_tokens == 3


@case
def completions_echo(access: Access) -> None:
    with access.sdk() as sdk:
        fields: Any = {"model": access.model, "prompt": "One two three", "temperature": 0, "logprobs": 2}
        alone = sdk.completions.create(**fields, echo=True, max_tokens=0)
        whole = sdk.completions.create(**fields, echo=True, max_tokens=4).choices[0]
        chunks = [
            chunk.choices[0]
            for chunk in sdk.completions.create(**fields, echo=True, max_tokens=4, stream=True)
        ]
        again = sdk.completions.create(**{**fields, "prompt": whole.text}, echo=True, max_tokens=0).choices[0]
    choice = alone.choices[0]
    assert (choice.text, choice.finish_reason) == ("One two three", "length")
    assert alone.usage is not None
    assert (alone.usage.prompt_tokens, alone.usage.completion_tokens) == (3, 0)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["One", " two", " three"]
    assert choice.logprobs.text_offset == [0, 3, 7]
    assert (choice.logprobs.token_logprobs or [0])[0] is None
    assert (choice.logprobs.top_logprobs or [{}])[0] is None
    # The answer's tokens score the same as if they had been the prompt's.
    assert whole.logprobs is not None
    assert "".join(whole.logprobs.tokens or []) == whole.text
    assert again.logprobs is not None
    assert again.logprobs.token_logprobs == whole.logprobs.token_logprobs
    assert "".join(chunk.text for chunk in chunks) == whole.text
    streamed = [value for chunk in chunks if chunk.logprobs for value in chunk.logprobs.token_logprobs or []]
    assert streamed == whole.logprobs.token_logprobs


@case
def models(access: Access) -> None:
    with access.sdk() as sdk:
        assert access.model in [model.id for model in sdk.models.list()]
        model: Any = sdk.models.retrieve(access.model)
        assert (model.object, model.max_model_len) == ("model", 8192)
        with raises(openai.NotFoundError) as caught:
            sdk.models.retrieve("nothing")
    assert caught[0].code == "model_not_found"


@case
def embeddings_say_what_to_do(access: Access) -> None:
    with access.sdk() as sdk:
        for call in (
            lambda: sdk.embeddings.create(model=access.model, input="text"),
            lambda: sdk.moderations.create(input="text"),
            lambda: sdk.files.list(),
            lambda: sdk.responses.retrieve("resp_1"),
        ):
            with raises(openai.NotFoundError) as caught:
                call()
            assert caught[0].code == "unsupported_endpoint"
            assert "/v1/chat/completions" in caught[0].message


@case
def errors_400_name_the_field(access: Access) -> None:
    wrong: list[tuple[str, Any]] = [
        ("temperature", {"temperature": 9}),
        ("max_tokens", {"max_tokens": 0}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("messages", {"messages": []}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
    ]
    with access.sdk() as sdk:
        for param, fields in wrong:
            with raises(openai.BadRequestError) as caught:
                sdk.chat.completions.create(**{"model": access.model, "messages": ASK, **fields})
            assert (caught[0].param, caught[0].type) == (param, "invalid_request_error"), caught[0].body
            assert isinstance(caught[0].code, str)
            assert caught[0].request_id
        with raises(openai.BadRequestError) as caught:
            sdk.completions.create(model=access.model, prompt="a", suffix="b")
        assert caught[0].param == "suffix"
        with raises(openai.BadRequestError) as caught:
            sdk.completions.create(model=access.model, prompt="word " * 9000)
        assert caught[0].code == "context_length_exceeded"


@case
def errors_401_403_404(access: Access) -> None:
    fields: Any = {"model": access.model, "messages": ASK, "max_tokens": 1}
    with (
        openai.OpenAI(**{**access.options(), "api_key": "sk-wrong"}) as sdk,
        raises(openai.AuthenticationError) as caught,
    ):
        sdk.chat.completions.create(**fields)
    assert caught[0].code == "invalid_api_key"
    with access.sdk("narrow") as sdk, raises(openai.PermissionDeniedError):
        sdk.chat.completions.create(**fields)
    with access.sdk() as sdk, raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(**{**fields, "model": "nothing"})
    assert (caught[0].code, caught[0].param) == ("model_not_found", "model")


@case
def error_429_says_when(access: Access) -> None:
    fields: Any = {"model": access.model, "prompt": "a", "max_tokens": 1}
    with access.sdk("limited") as sdk:
        raw = sdk.completions.with_raw_response.create(**fields)
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with raises(openai.RateLimitError) as caught:
            sdk.completions.create(**fields)
    assert caught[0].code == "rate_limit_exceeded"
    # The key's limit is one request a minute, and a minute is 60 s here.
    assert 1 <= int(caught[0].response.headers["retry-after-ms"]) <= 61_000


@case
def retries_wait_as_told(access: Access) -> None:
    fields: Any = {
        "model": access.model,
        "prompt": "a",
        "max_tokens": 400,
        "extra_body": {"ignore_eos": True},
    }
    with access.sdk("single", max_retries=30) as sdk:
        running = sdk.completions.create(**fields, stream=True)
        next(iter(running))
        began = time.monotonic()
        raw = sdk.completions.with_raw_response.create(**{**fields, "max_tokens": 1})
        took_s = time.monotonic() - began
        running.close()
    assert raw.retries_taken >= 1
    # One request at a time: the second is told to wait a second. The SDK's own first pause would be at most 0.5 s.
    assert took_s >= 0.9


@case
def a_timeout_drops_the_work(access: Access) -> None:
    with access.sdk(timeout=0.7) as sdk, raises(openai.APITimeoutError):
        sdk.completions.create(
            model=access.model, prompt="dropped", max_tokens=4000, extra_body={"ignore_eos": True}
        )
    deadline = time.monotonic() + 5
    while (record := access.get("/api/requests?limit=1")["requests"][0])["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, record
        time.sleep(0.02)
    assert record["status"] == "cancelled"
    assert record["usage"]["completion_tokens"] < 4000


@case
def error_504_is_a_server_error(access: Access) -> None:
    with access.sdk() as sdk, raises(openai.InternalServerError) as caught:
        sdk.completions.create(
            model=access.model, prompt="late", max_tokens=4, extra_headers={"x-request-timeout": "0.0001"}
        )
    assert (caught[0].status_code, caught[0].code) == (504, "deadline_exceeded")


@case
def raw_answers_have_headers(access: Access) -> None:
    with access.sdk() as sdk:
        raw = sdk.chat.completions.with_raw_response.create(model=access.model, messages=ASK, max_tokens=1)
        with sdk.chat.completions.with_streaming_response.create(
            model=access.model, messages=ASK, max_tokens=2, stream=True
        ) as streamed:
            lines = list(streamed.iter_lines())
    assert raw.headers["x-request-id"] == raw.parse()._request_id
    assert raw.headers["content-type"] == "application/json"
    assert streamed.headers["content-type"].startswith("text/event-stream")
    # An empty line ends every event, the last one, too.
    assert lines[-2:] == ["data: [DONE]", ""]


@case
def a_stream_may_be_left(access: Access) -> None:
    with access.sdk() as sdk:
        stream = sdk.chat.completions.create(
            model=access.model, messages=ASK, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        request_id = stream.response.headers["x-request-id"]
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 5
    while (record := access.get(f"/api/requests/{request_id}"))["status"] == "running":
        assert time.monotonic() < deadline, record
        time.sleep(0.02)
    assert record["status"] == "cancelled"


@case
def fifty_asynchronous_streams(access: Access) -> None:
    async def one(sdk: openai.AsyncOpenAI, number: int) -> str:
        fields: Any = {"model": access.model, "prompt": f"{number} is", "seed": number, "max_tokens": 12}
        chunks = [chunk async for chunk in await sdk.completions.create(**fields, stream=True)]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        return "".join(chunk.choices[0].text for chunk in chunks)

    async def all_of_them() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(**access.options()) as sdk:
            together = await asyncio.gather(*(one(sdk, number) for number in range(50)))
            return together, [await one(sdk, number) for number in (0, 17, 49)]

    together, alone = asyncio.run(all_of_them())
    assert alone == [together[0], together[17], together[49]]


def main() -> None:
    """Run every case with this environment's package and write `{"case", "error"}` lines."""
    access = Access(**json.loads(Path(sys.argv[1]).read_text()))
    for name, function in CASES.items():
        error = None
        try:
            function(access)
        except Exception:  # noqa: BLE001 - whatever it is, the next case is to be run, too
            error = traceback.format_exc(limit=-3)
        sys.stdout.write(json.dumps({"case": name, "package": openai.__version__, "error": error}) + "\n")


if __name__ == "__main__":
    main()
