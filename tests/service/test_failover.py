"""Answers whose state is more than their tokens go on when their worker is killed in the middle, and say the same."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.service.running import Service, running

MODEL = "smollm2-135m"
SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 10**15},
    "minItems": 40,
    "maxItems": 40,
}
HELD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Forty numbers as JSON."}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "numbers", "strict": True, "schema": SCHEMA},
    },
    "temperature": 1.0,
    "seed": 4,
    "max_tokens": 1000,
}
CHOICES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "n": 3,
    "temperature": 1.0,
    "seed": 5,
    "frequency_penalty": 0.5,
    "max_tokens": 300,
    "extra_body": {"ignore_eos": True},
}


def texts(sdk: openai.OpenAI, fields: dict[str, Any], *, kill: int | None = None) -> list[str]:
    """The text of every choice; the process `kill` is killed when some of it has come."""
    pieces = [""] * fields.get("n", 1)
    reasons = 0
    with contextlib.closing(sdk.chat.completions.create(model=MODEL, stream=True, **fields)) as stream:
        for number, chunk in enumerate(stream):
            if number == 60 and kill is not None:
                assert reasons == 0, "too late"
                os.kill(kill, signal.SIGKILL)
            for choice in chunk.choices:
                pieces[choice.index] += choice.delta.content or ""
                reasons += choice.finish_reason is not None
    assert reasons == len(pieces)
    return pieces


def decode_pid(service: Service) -> int:
    """The process of the decode worker, once one is ready and connected."""
    deadline = time.monotonic() + 30
    with service.client() as client:
        while True:
            worker = client.get("/api/workers/decode-0").json()
            if worker.get("state") == "ready" and worker["connected"] and psutil.pid_exists(worker["pid"]):
                return int(worker["pid"])
            assert time.monotonic() < deadline, (worker, service.output)
            time.sleep(0.05)


@pytest.mark.slow
def test_a_grammar_and_several_choices_outlive_their_decode_worker(tmp_path: Path) -> None:
    with (
        running(tmp_path / "data", "--no-console") as service,
        openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as sdk,
    ):
        for fields in (HELD, CHOICES):
            undisturbed = texts(sdk, fields)
            assert texts(sdk, fields, kill=decode_pid(service)) == undisturbed
