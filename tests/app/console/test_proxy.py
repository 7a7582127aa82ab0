import re
from collections.abc import AsyncIterator

import httpx
import pytest

from app.console.proxy import STATIC, create_console


def gateway(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/chat/completions":
        seen = {"key": request.headers.get("authorization"), "body": request.content.decode()}
        return httpx.Response(200, json=seen, headers={"x-request-id": "r-1", "x-secret": "kept inside"})
    if request.url.path == "/api/requests/a b":
        return httpx.Response(404, json={"error": {"message": f"query {request.url.query.decode()}"}})
    if (request.method, request.url.path) == ("DELETE", "/api/admin/prices/m"):
        return httpx.Response(200, json={"deleted": True})
    raise httpx.ConnectError("refused")


@pytest.fixture
async def console() -> AsyncIterator[httpx.AsyncClient]:
    app = create_console("http://gateway", transport=httpx.MockTransport(gateway))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://console") as client,
    ):
        yield client


async def test_requests_are_passed_on_with_key_and_body(console: httpx.AsyncClient) -> None:
    answer = await console.post("/v1/chat/completions", json={"a": 1}, headers={"Authorization": "Bearer k"})
    assert answer.json() == {"key": "Bearer k", "body": '{"a":1}'}
    assert answer.headers["x-request-id"] == "r-1"
    assert "x-secret" not in answer.headers


async def test_status_path_and_query_are_kept(console: httpx.AsyncClient) -> None:
    answer = await console.get("/api/requests/a%20b?x=1")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "query x=1")


async def test_an_unreachable_gateway_is_said_in_the_error_envelope(console: httpx.AsyncClient) -> None:
    answer = await console.get("/api/workers")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "gateway_unreachable")


async def test_the_page_is_served_with_a_strict_policy(console: httpx.AsyncClient) -> None:
    answer = await console.get("/")
    assert "cloudmatrix console" in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert (await console.get("/console.js")).headers["content-type"].startswith("text/javascript")


def test_what_scripts_name_is_there() -> None:
    """Elements by id, fields by name, pages, and imports: what a browser would only find out on the way."""
    page = (STATIC / "index.html").read_text()
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    scripts = {path.name: path.read_text() for path in STATIC.glob("*.js")}
    exported = {
        name: set(re.findall(r"export (?:async )?(?:function|const) (\w+)", text))
        for name, text in scripts.items()
    }
    for name, text in scripts.items():
        assert set(re.findall(r'\bat\("([^"]+)"\)', text)) <= set(ids), name
        for names, source in re.findall(r'import \{([^}]+)\} from "\./([^"]+)"', text):
            wanted = {wanted.strip() for wanted in names.split(",")}
            assert wanted <= exported[source], name
            for one in wanted:
                assert len(re.findall(rf"\b{one}\b", text)) > 1, f"{name} does not use {one}"
        for source in re.findall(r'from "\./([^"]+)"', text):
            assert source in scripts
    pages = set(re.findall(r'<main id="page-(\w+)"', page))
    assert pages == set(re.findall(r'<a href="#(\w+)"', page))
    assert pages == set(re.findall(r"^  (\w+): \{ read: ", scripts["console.js"], re.MULTILINE))
    # The policy forbids what stands in the page itself.
    assert not re.search(r"style=|onclick=|<style|<script>", page)


async def test_what_is_to_be_deleted_is_deleted_at_the_gateway(console: httpx.AsyncClient) -> None:
    answer = await console.delete("/api/admin/prices/m")
    assert (answer.status_code, answer.json()) == (200, {"deleted": True})


async def test_nothing_else_of_the_gateway_is_reachable(console: httpx.AsyncClient) -> None:
    assert (await console.get("/metrics")).status_code == 404
