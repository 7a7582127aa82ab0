"""Every way to fail has one shape: OpenAI's envelope, naming the field, and the service goes on."""

import asyncio
import json
from typing import Any

import pytest

from app.gateway import ConfigurationError, create_app
from app.settings import Settings
from tests.app.conftest import MODEL, Gateway, disaggregated, serving

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 2, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 2, **more}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def check(answer: Any, status: int, param: str | None, code: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    if code is not None:
        assert error["code"] == code
    if param is not None and status == 400:
        assert param.split("[")[0].split(".")[0] in error["message"]


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat(messages=[]), "messages"),
    (CHAT, chat(response_format={"type": "yaml"}), "response_format.type"),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (
        CHAT,
        chat(
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "strict": True,
                    "schema": {"uniqueItems": True, "type": "array"},
                },
            }
        ),
        "response_format.json_schema.schema",
    ),
    (CHAT, chat(guided_regex="(?=a)b"), "guided_regex"),
    (CHAT, chat(guided_json={"type": "wat"}), "guided_json"),
    (CHAT, chat(guided_json="not JSON"), "guided_json"),
    (CHAT, chat(guided_choice=[]), "guided_choice"),
    (CHAT, chat(guided_regex="a", guided_choice=["a"]), "guided_regex"),
    (CHAT, chat(structured_outputs={"regex": "("}), "structured_outputs.regex"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools[0].function"),
    (CHAT, chat(tools=[{"function": {"name": "f"}}]), "tools[0].type"),
    (CHAT, chat(tools=[tool("f g")]), "tools[0].function.name"),
    (CHAT, chat(tools=[tool("f"), tool("f")]), "tools[1].function.name"),
    (CHAT, chat(tools=[tool("f", parameters={"type": "array"})]), "tools[0].function.parameters"),
    (CHAT, chat(tools=[tool("f", parameters={"type": ["x"]})]), "tools[0].function.parameters"),
    (
        CHAT,
        chat(tools=[tool("f", strict=True, parameters={"properties": {"a": {"uniqueItems": True}}})]),
        "tools[0].function.parameters",
    ),
    (CHAT, chat(tools=[tool(f"f{i}") for i in range(129)]), "tools"),
    (CHAT, chat(tools=[tool("f")], guided_regex="a"), "guided_regex"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(tools=[tool("f")], tool_choice="some"), "tool_choice"),
    (CHAT, chat(tools=[tool("f")], tool_choice=tool("g")), "tool_choice"),
    (CHAT, chat(tools=[tool("f")], tool_choice={"type": "allowed_tools"}), "tool_choice"),
    (CHAT, chat(messages=[{"role": "tool", "content": "5"}]), "messages[0].tool_call_id"),
    (CHAT, chat(messages=[{"role": "user", "content": "5", "tool_calls": [CALL]}]), "messages[0].tool_calls"),
    (
        CHAT,
        chat(
            messages=[
                {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}
            ]
        ),
        "messages[0].tool_calls[0].function.arguments",
    ),
    (CHAT, {"model": MODEL}, "messages"),
    (CHAT, {"messages": HELLO}, "model"),
    (CHAT, chat(messages="hello"), "messages"),
    (CHAT, chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role"),
    (CHAT, chat(messages=[*HELLO, {"role": "user"}]), "messages[1].content"),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
    (CHAT, chat(max_tokens=-1), "max_tokens"),
    (CHAT, chat(max_tokens=0), "max_tokens"),
    (CHAT, chat(max_tokens="4"), "max_tokens"),
    (CHAT, chat(max_tokens=True), "max_tokens"),
    (CHAT, chat(max_completion_tokens=1.5), "max_completion_tokens"),
    (CHAT, chat(temperature="hot"), "temperature"),
    (CHAT, chat(temperature=2.5), "temperature"),
    (CHAT, chat(top_p=-0.1), "top_p"),
    (CHAT, chat(n=0), "n"),
    (CHAT, chat(n=100), "n"),
    (CHAT, chat(seed="x"), "seed"),
    (CHAT, chat(stop=[""]), "stop"),
    (CHAT, chat(stop=["a", "b", "c", "d", "e"]), "stop"),
    (CHAT, chat(stop=5), "stop"),
    (CHAT, chat(logit_bias={"x": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"99999999": 1}), "logit_bias"),
    (CHAT, chat(presence_penalty=3), "presence_penalty"),
    (CHAT, chat(top_logprobs=2), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(stream="yes"), "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    (CHAT, chat(stream=True, stream_options={"include_usage": 3}), "stream_options.include_usage"),
    (CHAT, chat(cache_salt=7), "cache_salt"),
    (CHAT, chat(cache_salt="x" * 257), "cache_salt"),
    (TEXT, text(cache_salt=""), "cache_salt"),
    ("/tokenize", {"prompt": "hello", "cache_salt": ["x"]}, "cache_salt"),
    (CHAT, chat(user=7), "user"),
    (CHAT, chat(metadata="x"), "metadata"),
    (TEXT, text(prompt=[]), "prompt"),
    (TEXT, text(prompt=""), "prompt"),
    (TEXT, text(prompt=["a", 1]), "prompt"),
    (TEXT, text(prompt=[1, 99_999_999]), "prompt"),
    (TEXT, text(prompt=[-1]), "prompt[0]"),
    (TEXT, text(prompt=["x"] * 65), "prompt"),
    (TEXT, text(logprobs=99), "logprobs"),
    (TEXT, text(max_tokens=0), "max_tokens"),
    (TEXT, text(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    (TEXT, text(prompt_logprobs=21), "prompt_logprobs"),
    (TEXT, text(echo="yes"), "echo"),
]

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].type"),
    (CHAT, chat(functions=[{"name": "f"}]), "functions"),
    (CHAT, chat(audio={"voice": "alloy"}), "audio"),
    (CHAT, chat(modalities=["audio"]), "modalities"),
    (CHAT, chat(min_tokens=3), "min_tokens"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages[0].content[0].type",
    ),
    (TEXT, text(suffix="x"), "suffix"),
    (TEXT, text(best_of=3), "best_of"),
]


async def test_bad_fields_are_named_and_the_service_goes_on(gateway: Gateway) -> None:
    for path, body, param in BAD_FIELDS:
        answer = await gateway.http.post(path, json=body)
        check(answer, 400, param)
    for path, body, param in UNSUPPORTED:
        check(await gateway.http.post(path, json=body), 400, param, "unsupported_parameter")
    assert (await gateway.http.post(CHAT, json=chat())).status_code == 200
    assert gateway.app is not None


async def test_harmless_fields_are_accepted(gateway: Gateway) -> None:
    body = chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        something_new={"x": 1},
        prompt_cache_key="k",
        stop=None,
        n=None,
        functions=None,
    )
    assert (await gateway.http.post(CHAT, json=body)).status_code == 200


async def test_bodies_that_are_no_json(gateway: Gateway) -> None:
    post = gateway.http.post
    head = {"content-type": "application/json"}
    check(await post(CHAT, content=b"{", headers=head), 400, None, "invalid_json")
    check(await post(CHAT, content=b"", headers=head), 400, None, "invalid_json")
    check(await post(CHAT, content=b"[1]", headers=head), 400, None)
    check(await post(CHAT, content=b'{"a":' + b"[" * 100_000, headers=head), 400, None, "invalid_json")
    check(await post(CHAT, content=b'{"model":"\\ud800"}', headers=head), 400, None, "invalid_json")
    bad_utf8 = json.dumps(chat()).encode().replace(b"hello", b"hel\xfflo")
    check(await post(CHAT, content=bad_utf8, headers=head), 400, None, "invalid_utf8")
    check(await post(CHAT, content=b"x=1", headers={"content-type": "text/plain"}), 415, "content-type")


async def test_routes_and_methods(gateway: Gateway) -> None:
    check(await gateway.http.get("/v1/nothing"), 404, None, "unknown_url")
    check(await gateway.http.get(CHAT), 405, None, "method_not_allowed")
    check(await gateway.http.post(CHAT, json=chat(model="gpt-9")), 404, "model", "model_not_found")
    check(await gateway.http.get("/v1/models/gpt-9"), 404, "model", "model_not_found")
    check(await gateway.http.get("/api/requests/req_0"), 404, "request_id")
    check(await gateway.http.get("/api/requests?limit=0"), 400, "limit")
    check(await gateway.http.post("/api/workers/nobody/drain"), 404, "worker_id")
    check(await gateway.http.post("/api/workers/prefill-0/role", json={"role": "king"}), 400, "role")


async def test_too_long_prompts_are_refused_fast(gateway: Gateway) -> None:
    # 100,000 words are at least 100,000 tokens.
    words = "word " * 100_000
    check(
        await gateway.http.post(CHAT, json=chat(messages=[{"role": "user", "content": words}])),
        400,
        "messages",
        "context_length_exceeded",
    )
    check(await gateway.http.post(TEXT, json=text(prompt=words)), 400, "prompt", "context_length_exceeded")
    check(
        await gateway.http.post(TEXT, json=text(prompt=[5] * 100_000)),
        400,
        "prompt",
        "context_length_exceeded",
    )
    check(
        await gateway.http.post(CHAT, json=chat(max_tokens=8192)),
        400,
        "max_tokens",
        "context_length_exceeded",
    )


async def test_body_limit(served: Any) -> None:
    async with serving(served, disaggregated(), max_body_bytes=2000) as gateway:
        check(await gateway.http.post(TEXT, json=text(prompt="x" * 3000)), 413, None, "request_too_large")

        async def pieces() -> Any:
            for _ in range(5):
                yield b"x" * 1000

        answer = await gateway.http.post(TEXT, content=pieces(), headers={"content-type": "application/json"})
        check(answer, 413, None, "request_too_large")


async def test_header_limit(served: Any) -> None:
    async with serving(served, disaggregated()) as gateway:
        # 32 KiB in all: a header of 31 KiB fits beside the client's own, two do not.
        for num_headers, status in ((1, 200), (2, 431)):
            headers = {f"x-padding-{i}": "x" * (31 << 10) for i in range(num_headers)}
            answer = await gateway.http.get("/v1/models", headers=headers)
            assert answer.status_code == status
        check(answer, 431, None, "headers_too_large")


async def test_no_worker_is_503_with_a_time_to_retry(served: Any) -> None:
    async with serving(served, [], ready=False) as gateway:
        answer = await gateway.http.post(CHAT, json=chat())
        check(answer, 503, None, "service_unavailable")
        assert int(answer.headers["retry-after-ms"]) == 1000
        ready = await gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["missing"]) == (503, ["prefill", "decode"])
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_admission_is_bounded(served: Any) -> None:
    workers = disaggregated()
    async with serving(served, workers, max_in_flight=1) as gateway:
        workers[0].is_held = True
        stream = gateway.http.stream("POST", CHAT, json=chat(stream=True))
        first = asyncio.create_task(gateway.http.post(CHAT, json=chat()))
        while not workers[0].submits:
            await asyncio.sleep(0.005)
        answer = await gateway.http.post(CHAT, json=chat())
        check(answer, 429, None, "rate_limit_exceeded")
        assert int(answer.headers["retry-after-ms"]) > 0
        workers[0].is_held = False
        assert (await first).status_code == 200
        async with stream as streamed:
            assert streamed.status_code == 200


async def test_keys(served: Any) -> None:
    async with serving(served, disaggregated(), api_keys="key-one,key-two") as gateway:
        check(await gateway.http.post(CHAT, json=chat()), 401, None, "invalid_api_key")
        for header in ("Bearer wrong", "Bearer", "Basic key-one", "key-one"):
            answer = await gateway.http.get("/v1/models", headers={"authorization": header})
            check(answer, 401, None, "invalid_api_key")
        good = {"authorization": "Bearer key-two"}
        assert (await gateway.http.post(CHAT, json=chat(), headers=good)).status_code == 200
        check(await gateway.http.get("/api/workers"), 401, None)
        assert (await gateway.http.get("/metrics")).status_code == 200


def test_others_may_not_call_without_keys(served: Any) -> None:
    with pytest.raises(ConfigurationError, match="CLOUDMATRIX_API_KEYS"):
        create_app(Settings(host="0.0.0.0"), models={served.id: served})
