"""Bodies nobody should send: whatever they hold, the answer is a 200 or an envelope, and never the server's fault."""

import json
import random
from typing import Any

from app.api.schemas import ChatRequest, CompletionRequest
from tests.app.conftest import MODEL, Gateway

NUM_BODIES = 400
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**63,
        -(2**64),
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "\u0000",
        "é😀",
        [],
        {},
    ),
    *(
        [None],
        [1],
        ["a"],
        [[]],
        [[1, 2]],
        {"a": 1},
        {"1": 5},
        {"type": "text"},
        {"include_usage": True},
        ["a"] * 5,
    ),
]


def odd_body(draw: random.Random, names: list[str], valid: dict[str, Any]) -> dict[str, Any]:
    body = dict(valid)
    for _ in range(draw.randint(1, 4)):
        body[draw.choice(names)] = draw.choice(ODD)
    for name in draw.sample(sorted(valid), draw.randint(0, 1)):
        body.pop(name, None)
    return body


async def test_odd_bodies_are_never_a_server_error(gateway: Gateway) -> None:
    draw = random.Random(20)
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    text = {"model": MODEL, "prompt": "hi", "max_tokens": 3}
    seen: set[int] = set()
    for number in range(NUM_BODIES):
        path, names, valid = (
            ("/v1/chat/completions", [*ChatRequest.__struct_fields__, "unheard_of"], chat)
            if number % 2
            else ("/v1/completions", [*CompletionRequest.__struct_fields__, "unheard_of"], text)
        )
        body = odd_body(draw, names, valid)
        answer = await gateway.http.post(path, json=body)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        elif not body.get("stream"):
            assert json.loads(answer.text)["choices"]
        else:
            assert answer.text.endswith("data: [DONE]\n\n")
    assert seen >= {200, 400}
    assert all(worker.num_sequences == 0 for worker in gateway.workers)
