"""The service on a Redis with users of its own roles, by the rules that `cloudmatrix pool acl` prints."""

from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from app.cli import app
from memory_pool.connection import endpoint_of
from memory_pool.redis_server import start_redis
from tests.memory_pool.conftest import poll
from tests.service.running import running

PROMPT = "word " * 200


def test_the_service_runs_and_its_gateway_cannot_read_a_block(tmp_path: Path) -> None:
    server = start_redis(tmp_path / "redis", maxmemory_bytes=256 << 20)
    path = endpoint_of(server.url).path
    everything = redis.Redis.from_url(server.url)
    for line in CliRunner().invoke(app, ["pool", "acl"]).output.splitlines():
        everything.execute_command(*line.replace("PASSWORD", "secret").split())
    gateway_url = f"unix://cloudmatrix-gateway:secret@{path}"
    args = ("--redis", f"unix://cloudmatrix-keeper:secret@{path}", "--gateway-redis", gateway_url)
    try:
        with running(tmp_path / "data", *args) as service, service.client() as client:
            body = {"model": "smollm2-135m", "prompt": PROMPT, "max_tokens": 4}

            def cached() -> int:
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            cached()
            poll(lambda: cached() > 0)
            # Limits, shared prefixes and statistics are the gateway's own work in Redis.
            limit = {"subject_kind": "tenant", "subject_id": "default", "requests_per_minute": 1000}
            assert client.post("/api/admin/limits", json=limit).is_success
            assert "x-ratelimit-limit-requests" in client.post("/v1/completions", json=body).headers
            prefix = {"name": "rules", "prompt": PROMPT}
            assert client.post("/api/admin/pool/shared", json=prefix).is_success
            assert client.post("/api/pins", json={**prefix, "ttl_s": 60}).is_success
            assert client.get("/api/pool").json()["blocks"] > 0
        refused = {
            f"{entry['username']} {entry['object']}"
            for entry in everything.acl_log()
            if not str(entry["object"]).startswith("client")
        }
        assert refused == set()
        name = next(iter(everything.scan_iter("cm:b:*")))
        assert len(everything.get(name)) > 1000  # type: ignore[arg-type]  # not awaited: the client is synchronous
        with redis.Redis.from_url(gateway_url) as gateway:
            with pytest.raises(redis.exceptions.NoPermissionError):
                gateway.get(name)
            assert gateway.exists(name) == 1
    finally:
        everything.close()
        server.stop()
