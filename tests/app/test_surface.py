"""The edges of the HTTP surface: what is not served, slashes, HEAD, other methods, pages of other origins."""

import asyncio

import pytest

from app.requests.served import ServedModel
from tests.app.conftest import MODEL, Gateway, disaggregated, serving

UNSERVED = [
    ("POST", "/v1/embeddings", "embeddings"),
    ("POST", "/v1/moderations", "classifier"),
    ("POST", "/v1/audio/transcriptions", "read and write text"),
    ("POST", "/v1/images/generations", "read and write text"),
    ("GET", "/v1/files", "kept"),
    ("GET", "/v1/files/file-1/content", "kept"),
    ("POST", "/v1/batches", "as many at once"),
    ("GET", "/v1/assistants", "whole conversation"),
    ("GET", "/v1/fine_tuning/jobs", "as they are"),
    ("GET", "/v1/responses/resp_1", "answers are not kept"),
    ("DELETE", "/v1/chat/completions/chatcmpl-1", "answers are not kept"),
]


@pytest.mark.parametrize(("method", "path", "why"), UNSERVED)
async def test_endpoints_that_are_not_served_say_why(
    gateway: Gateway, method: str, path: str, why: str
) -> None:
    answer = await gateway.http.request(method, path)
    assert answer.status_code == 404
    assert answer.headers["x-request-id"].startswith("req_")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_endpoint")
    assert path in error["message"]
    assert why in error["message"]
    assert "/v1/chat/completions" in error["message"]


async def test_unknown_paths_point_at_the_document(gateway: Gateway) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/embeddings"):
        error = (await gateway.http.get(path)).json()["error"]
        assert error["code"] == "unknown_url"
        assert "/openapi.json" in error["message"]


async def test_a_slash_at_the_end_means_nothing(gateway: Gateway) -> None:
    assert (await gateway.http.get("/v1/models/")).json() == (await gateway.http.get("/v1/models")).json()
    body = {"model": MODEL, "prompt": [1, 2], "max_tokens": 1}
    answer = await gateway.http.post("/v1/completions/", json=body)
    assert (answer.status_code, answer.history) == (200, [])


async def test_head_is_get_without_a_body(gateway: Gateway) -> None:
    for path in ("/v1/models", "/healthz", "/health", "/readyz", f"/v1/models/{MODEL}"):
        whole, head = await gateway.http.get(path), await gateway.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))
    assert (await gateway.http.head("/v1/models/none")).status_code == 404
    # The connection is still good for more.
    assert (await gateway.http.get("/healthz")).json() == {"status": "alive"}


async def test_another_method_is_405_and_says_which_is_allowed(gateway: Gateway) -> None:
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/chat/completions", "POST"),
        ("DELETE", f"/v1/models/{MODEL}", "GET"),
        ("OPTIONS", "/v1/responses", "POST"),
    ):
        answer = await gateway.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.headers["x-request-id"].startswith("req_")
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_a_slash_does_not_open_what_a_key_does_not(served: ServedModel) -> None:
    async with serving(served, disaggregated(), api_keys=("sk-operator",)) as gateway:
        for path in ("/v1/models/", "/api/workers/", "/healthz/../v1/models"):
            assert (await gateway.http.get(path)).status_code == 401
        assert (await gateway.http.get("/healthz/")).status_code == 200


async def test_pages_of_named_origins_alone_may_call(served: ServedModel) -> None:
    named = {"origin": "https://app.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    keys = ("sk-operator",)
    async with serving(
        served, disaggregated(), api_keys=keys, cors_origins=("https://app.example",)
    ) as gateway:
        path = "/v1/chat/completions"
        preflight = await gateway.http.options(path, headers={**named, **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        refused = await gateway.http.post(
            path, json={}, headers=named
        )  # without a key, which a page can read
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = await gateway.http.options(path, headers={"origin": "https://other.example", **asks})
        assert "access-control-allow-origin" not in other.headers
    async with serving(served, disaggregated()) as gateway:
        answer = await gateway.http.get("/v1/models", headers=named)
        assert "access-control-allow-origin" not in answer.headers


async def test_answers_leave_no_task_behind(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": [1, 2], "max_tokens": 3}
    before = asyncio.all_tasks()
    for stream in (False, True):
        for _ in range(3):
            answer = await gateway.http.post("/v1/completions", json={**body, "stream": stream})
            assert answer.status_code == 200
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)
