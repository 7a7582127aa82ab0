"""Nothing that a request says makes the gateway reach out: what would need fetching is refused by name."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.app.conftest import MODEL, Gateway
from tests.app.test_refusals import CHAT, TEXT, chat, check, text, tool

RESPONSES = "/v1/responses"


@dataclass
class Lure:
    """A server on this machine that notes whoever connects."""

    url: str
    num_connections: int = 0


@pytest.fixture
async def lure() -> AsyncIterator[Lure]:
    found = Lure("")

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.num_connections += 1
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/secret"
    async with server:
        yield found


def message_parts(url: str) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "file", "file": {"file_data": url}},
        {"type": "file", "file": {"file_url": url}},
        {"type": "input_file", "file_url": url},
        {"type": "input_file", "file_data": url},
        {"type": "video_url", "video_url": {"url": url}},
    ]


def message_bodies(url: str) -> list[tuple[str, dict[str, Any], str]]:
    """Requests whose messages hold something to fetch, each with the field to be named."""
    found: list[tuple[str, dict[str, Any], str]] = []
    for part in message_parts(url):
        message = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}
        found.append((CHAT, chat(messages=[message]), "messages[0].content[1].type"))
        typed = {"role": "user", "content": [part]}
        found.append((RESPONSES, {"model": MODEL, "input": [typed]}, "input[0].content[0].type"))
    return found


def tool_bodies(url: str) -> list[tuple[str, dict[str, Any], str]]:
    """Requests for tools that somebody else would have to be asked for."""
    hosted: list[dict[str, Any]] = [
        {"type": "mcp", "server_label": "x", "server_url": url},
        {"type": "web_search"},
        {"type": "file_search", "vector_store_ids": ["x"]},
    ]
    return [
        (path, body, "tools[0].type")
        for one in hosted
        for path, body in (
            (CHAT, chat(tools=[one])),
            (RESPONSES, {"model": MODEL, "input": "hello", "tools": [one]}),
        )
    ]


def schema_bodies(reference: str) -> list[tuple[str, dict[str, Any], str]]:
    """Requests whose answer is to keep to a schema that lies elsewhere."""
    schemas: list[dict[str, Any]] = [
        {"$ref": reference},
        {"$schema": reference},
        {"type": "object", "properties": {"a": {"$ref": f"{reference}#/definitions/a"}}},
        {"$id": reference, "type": "array", "items": {"$ref": "other.json"}},
    ]
    found: list[tuple[str, dict[str, Any], str]] = []
    for schema in schemas:
        for path, body in ((CHAT, chat), (TEXT, text)):
            found.append((path, body(guided_json=schema), "guided_json"))
            found.append((path, body(structured_outputs={"json": schema}), "structured_outputs.json"))
        for strict in (False, True):
            named = {"name": "n", "strict": strict, "schema": schema}
            response_format = {"type": "json_schema", "json_schema": named}
            found.append((CHAT, chat(response_format=response_format), "response_format.json_schema.schema"))
            form = {"format": {"type": "json_schema", **named}}
            found.append((RESPONSES, {"model": MODEL, "input": "hello", "text": form}, "text.format.schema"))
        if "items" in schema:
            continue  # parameters are objects
        parameters = {"type": "object", "properties": {"a": schema}}
        for strict in (False, True):
            held = tool("f", strict=strict, parameters=parameters)
            found.append((CHAT, chat(tools=[held]), "tools[0].function.parameters"))
            flat = {"type": "function", "name": "f", "strict": strict, "parameters": parameters}
            body = {"model": MODEL, "input": "hello", "tools": [flat]}
            found.append((RESPONSES, body, "tools[0].parameters"))
    grammar = 'start: %json {"$ref": "' + reference + '"}'
    found.append((CHAT, chat(guided_grammar=grammar), "guided_grammar"))
    return found


async def test_what_would_have_to_be_fetched_is_refused_and_nothing_is_fetched(
    gateway: Gateway, lure: Lure
) -> None:
    asked = [*message_bodies(lure.url), *tool_bodies(lure.url), *schema_bodies(lure.url)]
    asked += [*message_bodies("file:///etc/passwd"), *schema_bodies("file:///etc/passwd")]
    for path, body, param in asked:
        check(await gateway.http.post(path, json=body), 400, param)
    # What is sent along with every request is only read: a link in it is a text.
    harmless = {"metadata": {"link": lure.url}, "user": lure.url, "guided_json": {"description": lure.url}}
    linked = chat(messages=[{"role": "user", "content": lure.url}], **harmless)
    headers = {"referer": lure.url, "origin": lure.url, "x-forwarded-host": lure.url}
    assert (await gateway.http.post(CHAT, json=linked, headers=headers)).status_code == 200
    assert lure.num_connections == 0
    # The lure works: somebody who does connect is seen.
    assert (await gateway.http.get(lure.url)).status_code == 200
    assert lure.num_connections == 1
