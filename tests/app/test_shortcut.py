"""Requests for answers go straight to their endpoints, and in all that can be seen as the framework would take them."""

import pytest
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from app.api.shortcut import Shortcut
from tests.app.conftest import MODEL, Gateway


class Framework:
    """Notes what reaches it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append((scope["type"], scope.get("method", ""), scope.get("path", "")))


async def test_only_its_routes_pass_by_the_framework() -> None:
    router, framework = APIRouter(), Framework()

    @router.post("/v1/things")
    async def make(request: Request) -> Response:
        return Response(await request.body(), 201)

    shortcut = Shortcut(framework, [router])
    sent = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/things", "headers": []}
    await shortcut(scope, receive, send)  # type: ignore[arg-type]
    assert framework.seen == []
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]  # type: ignore[index]
    assert scope["route"].path == "/v1/things"  # type: ignore[attr-defined]
    for other in (
        {"type": "http", "method": "GET", "path": "/v1/things"},
        {"type": "http", "method": "POST", "path": "/v1/other"},
        {"type": "lifespan"},
    ):
        await shortcut(other, receive, send)  # type: ignore[arg-type]
    assert framework.seen == [
        ("http", "GET", "/v1/things"),
        ("http", "POST", "/v1/other"),
        ("lifespan", "", ""),
    ]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_answers_and_failures_of_shortcuts_are_counted_by_route(gateway: Gateway, path: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {}
    prompt |= {"prompt": "hi"} if path == "/v1/completions" else {}
    prompt |= {"input": "hi"} if path == "/v1/responses" else {}
    good = await gateway.http.post(path, json={"model": MODEL, **prompt})
    bad = await gateway.http.post(path, json={"model": "none", **prompt})
    broken = await gateway.http.post(path, content=b"{")
    wrong = await gateway.http.get(path)
    assert [answer.status_code for answer in (good, bad, broken, wrong)] == [200, 404, 400, 405]
    assert wrong.headers["allow"] == "POST"
    for answer in (bad, broken, wrong):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    counted = (await gateway.http.get("/metrics")).text
    for status in (200, 404, 400):
        assert f'cloudmatrix_http_requests_total{{endpoint="{path}",status="{status}"}} 1.0' in counted


async def test_what_nobody_foresaw_is_an_envelope_too(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("app.api.chat.begin", fail)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    answer = await gateway.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "on purpose" not in answer.text
