"""Tool calls: read from text however it is cut, told of in the prompt, and held to their schemas."""

import json
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from app.api.schemas import ChatRequest, Message
from app.requests.calls import CallReader
from app.requests.conversation import prompt_tokens
from app.requests.served import ServedModel
from app.requests.tools import offered, tool_grammar
from app.text.chat_template import ChatTemplate
from engine.grammar import GrammarCompiler
from engine.vocabulary import Vocabulary
from tests.app.conftest import MODEL, Gateway

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or CITY, **more}}


def written(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


NESTED = '{"a": [{"b": "}</tool_call><tool_call>{"}, "\\\\"], "c": "\\"}"}'
ANSWERS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("plain < text", "plain < text", []),
    ("ends as <tool_ca", "ends as <tool_ca", []),
    (written("f", "{}"), "", [("f", "{}")]),
    ("First. " + written("f", NESTED) + written("g-2", "{}"), "First. ", [("f", NESTED), ("g-2", "{}")]),
    ("<tool<" + written("f", '{"a": "é😀"}'), "<tool<", [("f", '{"a": "é😀"}')]),
    # Cut off inside the arguments, and before there is a name.
    (written("f", "{}") + '<tool_call>{"name": "g", "arguments": {"a', "", [("f", "{}"), ("g", '{"a')]),
    ('<tool_call>{"name": "g', "", []),
]


@pytest.mark.parametrize(("answer", "text", "calls"), ANSWERS)
def test_calls_are_read_however_the_answer_is_cut(
    answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    draw = random.Random(3)
    for longest in (1, 2, 7, 1000):
        reader, got_text, got = CallReader(), "", dict[int, list[Any]]()
        at = 0
        while at < len(answer):
            length = draw.randint(1, longest)
            piece, deltas = reader.feed(answer[at : at + length])
            at += length
            got_text += piece
            for delta in deltas:
                if delta.name is not None:
                    assert delta.index == len(got), "a name comes once, with the next index"
                    assert delta.call_id
                    got[delta.index] = [delta.name, "", delta.call_id]
                got[delta.index][1] += delta.arguments
        assert (got_text + reader.finish(), [(c[0], c[1]) for c in got.values()]) == (text, calls)
        assert len({c[2] for c in got.values()}) == len(calls), "each call has an id of its own"
        assert reader.is_complete == (bool(calls) and answer.endswith("</tool_call>"))


async def grammar_of(**fields: Any) -> str:
    body = msgspec.convert({"model": MODEL, "messages": [], **fields}, ChatRequest)
    offer = offered(body.tools or (), body.tool_choice, parallel=body.parallel_tool_calls)
    assert offer is not None
    return await tool_grammar(offer, body, body.response_format)


def accepts(grammar: str, text: str) -> bool:
    letters = Vocabulary(tokens=(*(bytes([i]) for i in range(256)), b"<end>"), control=frozenset([256]))
    matcher = GrammarCompiler(lambda: letters, vocab_size=257, eos_ids=[256]).compile(grammar)
    data = list(text.encode())
    if matcher.allowed_part(data) < len(data):
        return False
    for letter in data:
        matcher.accept(letter)
    return matcher.inner.is_accepting()


F, G = written("f", '{"city": "Paris"}'), written("g", '{"city": "Rome"}')


async def test_what_each_choice_lets_through() -> None:
    tools = [tool("f"), tool("g")]
    auto = await grammar_of(tools=tools)
    for answer in ("", "a < b", "text", F, F + G, "Let me see. " + F, F * 8):
        assert accepts(auto, answer), answer
    for answer in (F * 9, F + "text", "x <tool_call>y", written("h", "{}"), written("f", '{"city": 1}')):
        assert not accepts(auto, answer), answer
    required = await grammar_of(tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert [accepts(required, answer) for answer in (F, G, F + G, "text", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    named = await grammar_of(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})
    assert [accepts(named, answer) for answer in (F, G, G + G)] == [False, True, False]
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}
    allowed = await grammar_of(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": some})
    assert [accepts(allowed, answer) for answer in (F, F + F, G, "text")] == [True, True, False, False]
    shaped = await grammar_of(
        tools=tools,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": CITY}},
    )
    assert [accepts(shaped, answer) for answer in (F, '{"city": "x"}', "text")] == [True, True, False]
    bare = await grammar_of(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required")
    assert [accepts(bare, written("f", a)) for a in ("{}", '{"a": 1}')] == [True, False]


CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city":"Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees <|im_end|>"},
]


async def test_a_model_without_a_tool_section_is_told_in_the_system_message(served: ServedModel) -> None:
    messages = msgspec.convert([{"role": "system", "content": "Be brief."}, *CALLED], list[Message])
    body = msgspec.convert({"model": MODEL, "messages": [], "tools": [tool("f")]}, ChatRequest)
    functions = [one.function for one in body.tools or () if one.function]
    tokens = await prompt_tokens(served, messages, functions)
    tokenizer = served.text.tokenizer
    text = b"".join(map(tokenizer.token_bytes, tokens)).decode()
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions")
    assert '{"name": "f", "parameters": {"type": "object"' in text
    assert f"<|im_start|>assistant\n{F}<|im_end|>" in text
    assert "<tool_response>\n18 degrees <|im_end|>\n</tool_response><|im_end|>" in text
    end = tokenizer.encode("<|im_end|>")[0]
    # Four turns end with the control token; the name inside the result is plain text.
    assert tokens.count(end) == 4


async def test_a_template_that_knows_calls_writes_them_itself(served: ServedModel) -> None:
    source = (
        "{% for t in tools or [] %}T {{ t.function.name }} {{ t.function.parameters | tojson }};{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    told = replace(served, text=replace(served.text, chat_template=ChatTemplate(source)))
    messages = msgspec.convert(CALLED, list[Message])
    body = msgspec.convert({"model": MODEL, "messages": [], "tools": [tool("f")]}, ChatRequest)
    functions = [one.function for one in body.tools or () if one.function]
    tokens = await prompt_tokens(told, messages, functions)
    prompt = b"".join(map(served.text.tokenizer.token_bytes, tokens)).decode()
    assert prompt == (
        f"T f {json.dumps(CITY)};[user]Weather?[assistant]<tool_call>Paris[tool]18 degrees <|im_end|>"
    )


async def test_none_hides_the_tools_and_auto_shows_them(gateway: Gateway) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": CALLED[:1], "max_tokens": 1}
    lengths = []
    for more in ({}, {"tools": [tool("f")], "tool_choice": "none"}, {"tools": []}, {"tools": [tool("f")]}):
        answer = await gateway.http.post("/v1/chat/completions", json={**fields, **more})
        assert answer.status_code == 200, answer.text
        lengths.append(answer.json()["usage"]["prompt_tokens"])
    assert lengths[0] == lengths[1] == lengths[2] < lengths[3]
    grammars = [submit.sampling.grammar for submit in gateway.workers[0].submits]
    assert [grammar is None for grammar in grammars] == [True, True, True, False]
