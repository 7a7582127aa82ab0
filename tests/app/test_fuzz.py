"""Bodies nobody should send: whatever they hold, the answer is a 200 or an envelope, and never the server's fault."""

import json
import random
from typing import Any

from app.api.responses_schemas import ResponsesRequest
from app.api.schemas import ChatRequest, CompletionRequest, Sampling
from tests.app.conftest import MODEL, Gateway

NUM_BODIES = 450
ROUTES: list[tuple[str, type[Sampling], dict[str, Any]]] = [
    ("/v1/completions", CompletionRequest, {"prompt": "hi", "max_tokens": 3}),
    (
        "/v1/chat/completions",
        ChatRequest,
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    ),
    ("/v1/responses", ResponsesRequest, {"input": "hi", "max_output_tokens": 3}),
]
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
    seen: set[int] = set()
    for number in range(NUM_BODIES):
        path, body_type, valid = ROUTES[number % len(ROUTES)]
        body = odd_body(draw, [*body_type.__struct_fields__, "unheard_of"], {"model": MODEL, **valid})
        answer = await gateway.http.post(path, json=body)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        elif not body.get("stream"):
            told = json.loads(answer.text)
            assert told.get("choices") or told["output"]
        else:
            events = answer.text.split("\n\n")
            assert events.pop() == ""
            assert events[-1] == "data: [DONE]" or "event: response.incomplete" in events[-1], body
    assert seen >= {200, 400}
    assert all(worker.num_sequences == 0 for worker in gateway.workers)
