"""`/v1/responses` by the unmodified `openai` package; echo workers answer with the prompt's own tokens."""

import json
from typing import Any

import msgspec
import pytest

from app.api.answers import WholeAnswer
from app.api.responses_events import ResponseEvents
from app.api.responses_reply import Reply
from app.api.responses_schemas import ResponsesRequest
from app.api.schemas import ChosenLogprob, Message, PromptTokensDetails, ToolCall, Usage
from app.errors import InvalidRequestError, UnavailableError
from app.requests.calls import CallReader
from app.requests.choice import Piece
from app.requests.record import RequestRecord
from app.requests.responses import talk_of
from app.requests.served import ServedModel
from engine.protocol import Failed, Submit
from tests.app.conftest import MODEL, Gateway, disaggregated, serving
from tests.app.test_tools import CITY, written

LONG: Any = {
    "model": MODEL,
    "input": "Say something",
    "max_output_tokens": 12,
    "extra_body": {"ignore_eos": True},
}
ECHOED = "system\nYou are a helpful AI assistant named Smol"
"""Twelve tokens of the prompt's own, the first of which is a control token without text."""


async def test_whole_and_streamed_say_the_same(gateway: Gateway) -> None:
    whole = await gateway.sdk.responses.create(**LONG)
    assert (whole.object, whole.status, whole.model) == ("response", "incomplete", MODEL)
    assert whole.output_text == ECHOED
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    assert whole.usage.total_tokens == whole.usage.input_tokens + 12
    # The echo workers say that all full blocks of 32 tokens were cached.
    assert whole.usage.input_tokens_details.cached_tokens == whole.usage.input_tokens // 32 * 32
    assert (await gateway.record(whole._request_id or ""))["endpoint"] == "responses"
    stream = await gateway.sdk.responses.create(**LONG, stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert len(deltas) > 3
    assert "".join(event.delta for event in deltas) == ECHOED
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output[0].content == whole.output[0].content  # type: ignore[union-attr]  # messages
    assert last.response.usage == whole.usage


async def test_an_answer_that_ends_by_itself_is_completed(gateway: Gateway) -> None:
    # The echo ends with the first <|im_end|> of the prompt, after the system message.
    whole = await gateway.sdk.responses.create(model=MODEL, input="x", instructions="a b c d")
    assert (whole.status, whole.output_text) == ("completed", "system\na b c d")
    assert whole.incomplete_details is None
    async with gateway.sdk.responses.stream(model=MODEL, input="x", instructions="a b c d") as stream:
        final = await stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", "system\na b c d")


async def test_log_probabilities(gateway: Gateway) -> None:
    fields: Any = {**LONG, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = await gateway.sdk.responses.create(**fields)
    part = whole.output[0].content[0]  # type: ignore[union-attr]  # a message of one text
    assert part.type == "output_text"
    assert len(part.logprobs or []) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs or [])
    events = [event async for event in await gateway.sdk.responses.create(**fields, stream=True)]
    streamed = [e.logprobs for e in events if e.type == "response.output_text.delta"]
    assert [entry.token for piece in streamed for entry in piece] == [e.token for e in part.logprobs or []]
    plain = await gateway.sdk.responses.create(**LONG)
    assert plain.output[0].content[0].logprobs == []  # type: ignore[union-attr]  # a message of one text


async def test_a_failure_inside_a_stream_is_an_event(served: ServedModel) -> None:
    def refuse(submit: Submit) -> Failed:
        return Failed(request_id=submit.request_id, code="invalid", message="broken on purpose")

    workers = disaggregated(step_s=0.02)
    async with serving(served, workers) as gateway:
        events = []
        async for event in await gateway.sdk.responses.create(
            **{**LONG, "max_output_tokens": 400}, stream=True
        ):
            if event.type == "response.output_text.delta" and len(events) < 8:
                # Nobody carries the answer on.
                for worker in workers:
                    worker.refuse = refuse
                    await worker.die()
            events.append(event)
    *_, done, error, failed = events
    assert done.type == "response.output_item.done"
    assert done.item.status == "incomplete"  # type: ignore[union-attr]  # a message
    assert error.type == "error"
    assert "broken on purpose" in error.message
    assert failed.type == "response.failed"
    assert (failed.response.status, failed.response.output) == ("failed", [done.item])
    assert failed.response.error is not None
    assert [event.sequence_number for event in events] == list(range(len(events)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_tokens": 3}, "max_tokens"),
    # Dividing by it would overflow in the worker.
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"content": "a"}]}, "input[0].role"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    (
        {
            "instructions": "i",
            "input": [
                {"role": "user", "content": "a"},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "d", "name": "f", "arguments": "["},
            ],
        },
        "input[2].arguments",
    ),
    ({"input": "a " * 10_000}, "input"),
    ({"max_output_tokens": 100_000}, "max_output_tokens"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "odd"}}}},
        "text.format.schema",
    ),
]


async def test_what_cannot_be_served_is_refused_by_name(gateway: Gateway) -> None:
    for fields, param in REFUSED:
        answer = await gateway.http.post("/v1/responses", json={"model": MODEL, "input": "a", **fields})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param, error
        assert param in error["message"]


async def test_hints_without_effect_are_accepted(gateway: Gateway) -> None:
    answer = await gateway.sdk.responses.create(
        **LONG,
        store=False,
        metadata={"a": "b"},
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low"},
        truncation="disabled",
        user="u",
    )
    assert (answer.metadata, answer.output_text) == ({"a": "b"}, ECHOED)
    assert answer.to_dict()["store"] is False


def test_items_become_turns() -> None:
    items: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "We"}, {"type": "input_text", "text": "ather?"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": "Let me see.",
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "18"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "19"}]},
    ]
    body = msgspec.convert({"model": MODEL, "instructions": "Be brief.", "input": items}, ResponsesRequest)
    calls = [
        {"id": call_id, "function": {"name": name, "arguments": "{}"}}
        for call_id, name in (("c1", "f"), ("c2", "g"))
    ]
    assert talk_of(body).messages == [
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message("assistant", "Let me see.", tool_calls=msgspec.convert(calls, list[ToolCall])),
        Message("tool", "18", tool_call_id="c1"),
        Message("tool", "19", tool_call_id="c2"),
    ]


def test_an_error_inside_a_turn_names_the_item() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    ]
    talk = talk_of(msgspec.convert({"model": MODEL, "instructions": "i", "input": items}, ResponsesRequest))
    path = "messages[2].tool_calls[0].function.arguments"

    def fail() -> None:
        with talk.named():
            raise InvalidRequestError(f"{path}: odd", param=path, code="x")

    with pytest.raises(InvalidRequestError) as caught:
        fail()
    assert (caught.value.message, caught.value.param) == ("input[1].arguments: odd", "input[1].arguments")
    assert caught.value.body.code == "x"


async def test_tools_and_their_choice_reach_the_worker(gateway: Gateway) -> None:
    tool = {"type": "function", "name": "f", "parameters": CITY, "strict": True}
    choices: list[Any] = [
        "none",
        "auto",
        "required",
        {"type": "function", "name": "f"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
    ]
    for choice in choices:
        body = {"model": MODEL, "input": "a", "max_output_tokens": 1, "tools": [tool], "tool_choice": choice}
        answer = await gateway.http.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["tool_choice"], told["tools"][0]["name"]) == (choice, "f")
    grammars = [submit.sampling.grammar for submit in gateway.workers[0].submits]
    assert [grammar is None for grammar in grammars] == [True, False, False, False, False]
    wanted = {"format": {"type": "json_schema", "name": "n", "schema": CITY, "strict": True}}
    answer = await gateway.http.post(
        "/v1/responses", json={**body, "tools": [], "tool_choice": "auto", "text": wanted}
    )
    assert answer.json()["text"]["format"] == wanted["format"]
    assert gateway.workers[0].submits[-1].sampling.grammar is not None


CALLS = "Let me see. " + written("f", '{"city": "Paris"}') + written("g", '{"city": "Rome"}')


@pytest.mark.parametrize("text", ["", "Just text.", CALLS, written("f", '{"city": "Par'), CALLS[12:]])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_events_add_up_to_the_whole_answer(served: ServedModel, text: str, reason: str) -> None:
    body = msgspec.convert({"model": MODEL, "input": "a"}, ResponsesRequest)
    reply = Reply(body, RequestRecord("req_1", "responses", 5, 0.0), served)
    events, answer, reader = ResponseEvents(reply), WholeAnswer(), CallReader()
    data = b""
    for letter in [*text, None]:
        said, calls = reader.feed(letter or "")
        logprobs = [ChosenLogprob(letter, -0.5, list(letter.encode()), [])] if letter else None
        piece = Piece(0, said, logprobs, None if letter else reason, calls)
        answer.take(piece)
        data += events.pieces([piece])
    usage = Usage(3, 4, 7, PromptTokensDetails(2, 1))
    whole = msgspec.to_builtins(reply.whole(answer, usage))
    data += events.usage(usage)
    parsed = [json.loads(event.partition("data: ")[2]) for event in data.decode().split("\n\n")[:-1]]
    assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
    final = parsed[-1]["response"]
    assert {**final, "completed_at": 0} == {**whole, "completed_at": 0}
    assert parsed[-1]["type"] == f"response.{'incomplete' if reason == 'length' else 'completed'}"
    added = [event for event in parsed if event["type"] == "response.output_item.added"]
    done = [event for event in parsed if event["type"] == "response.output_item.done"]
    assert [e["output_index"] for e in added] == [e["output_index"] for e in done] == list(range(len(added)))
    assert [event["item"] for event in done] == whole["output"]
    for place, item in enumerate(whole["output"]):
        kind = "function_call_arguments" if item["type"] == "function_call" else "output_text"
        deltas = [
            event["delta"]
            for event in parsed
            if event["type"] == f"response.{kind}.delta" and event["output_index"] == place
        ]
        assert "".join(deltas) == (item["arguments"] if "call_id" in item else item["content"][0]["text"])


def test_a_failure_before_anything_still_begins_the_response(served: ServedModel) -> None:
    body = msgspec.convert({"model": MODEL, "input": "a"}, ResponsesRequest)
    reply = Reply(body, RequestRecord("req_1", "responses", 5, 0.0), served)
    data = ResponseEvents(reply).failure(UnavailableError("nobody")).decode()
    names = [line.removeprefix("event: ") for line in data.splitlines() if line.startswith("event: ")]
    assert names == ["response.created", "response.in_progress", "error", "response.failed"]
