"""What grammar-constrained decoding costs and keeps: random schemas through the service, every answer validated."""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema

Progress = Callable[[int, int], None]
_REPORT_S = 5.0
_NAMES = ["name", "city", "age", "tags", "size", "color", "items", "note", "id", "price"]
_FUNCTIONS = ["get_weather", "find_flight", "send_note", "convert", "book_table", "look_up"]
_MAX_TOKENS = 2000


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of an object whose values are bounded, so that every answer ends."""
    names = draw.sample(_NAMES, draw.randint(1, 4 if depth == 0 else 2))
    return {
        "type": "object",
        "properties": {name: _value(draw, depth + 1) for name in names},
        "required": names if draw.random() < 0.8 else names[:1],
        "additionalProperties": False,
    }


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.randrange(7 if depth < 3 else 5)
    low = draw.randint(-50, 50)
    match kind:
        case 0:
            return {"type": "string", "minLength": draw.randint(0, 3), "maxLength": draw.randint(4, 24)}
        case 1:
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 5000)}
        case 2:
            return {
                "enum": draw.sample(["red", "green", 1, 2.5, None, True, 'a "b"', "é"], draw.randint(1, 4))
            }
        case 3:
            return {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
        case 4:
            return {"type": "string", "pattern": draw.choice(["^[A-Z]{2}-[0-9]{3}$", "^(yes|no|maybe)$"])}
        case 5:
            few = draw.randint(0, 2)
            items = _value(draw, depth + 1)
            return {"type": "array", "items": items, "minItems": few, "maxItems": few + draw.randint(0, 2)}
        case _:
            return random_schema(draw, depth)


@dataclass(frozen=True)
class Shape:
    """What one answer is held to: fields of a request, words that make a free request's prompt as long, a check."""

    fields: dict[str, Any]
    words: str
    check: Callable[[dict[str, Any]], None]
    """Raises ValueError, KeyError or jsonschema's ValidationError when a choice is not of this shape."""


def random_format(draw: random.Random) -> Shape:
    """A `response_format` with a random schema."""
    schema = random_schema(draw)
    wanted = {"name": "random", "strict": True, "schema": schema}

    def check(choice: dict[str, Any]) -> None:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)

    return Shape({"response_format": {"type": "json_schema", "json_schema": wanted}}, "", check)


def random_tools(draw: random.Random) -> Shape:
    """One to four strict functions with random parameters, of which at least one must be called."""
    parameters = {name: random_schema(draw) for name in draw.sample(_FUNCTIONS, draw.randint(1, 4))}
    tools = [
        {"type": "function", "function": {"name": name, "strict": True, "parameters": schema}}
        for name, schema in parameters.items()
    ]

    def check(choice: dict[str, Any]) -> None:
        calls = choice["message"]["tool_calls"]
        if not calls or choice["finish_reason"] != "tool_calls":
            raise ValueError("no call, or one that was cut")
        for call in calls:
            jsonschema.validate(
                json.loads(call["function"]["arguments"]), parameters[call["function"]["name"]]
            )

    fields = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": draw.random() < 0.5}
    return Shape(fields, json.dumps(tools), check)


def bench_grammar(
    url: str,
    model: str,
    *,
    schemas: int,
    seed: int = 0,
    shape: Callable[[random.Random], Shape] = random_format,
    progress: Progress = lambda _done, _total: None,
) -> dict[str, Any]:
    """Ask for each shape once held to it, then for as many tokens without it, one request at a time.

    `decode_slowdown` is the median over the pairs of (seconds a token held / seconds a token free) - 1, both as the
    decode worker measured them: pairs follow each other closely, so that what else the machine does concerns both.
    Raises httpx.HTTPError when the service does not answer.
    """
    draw = random.Random(seed)  # noqa: S311 - reproducible schemas, not secrets
    ratios, num_valid, faults = [], 0, []
    held_s, free_s = [], []
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for number in range(schemas):
            wanted = shape(draw)
            question = f"Make up an example, number {number}, as JSON."
            body = {"model": model, "seed": number, "messages": [{"role": "user", "content": question}]}
            held, held_tpot_s = _ask(client, {**body, **wanted.fields, "max_tokens": _MAX_TOKENS})
            choice, num_tokens = held["choices"][0], held["usage"]["completion_tokens"]
            try:
                wanted.check(choice)
                num_valid += 1
            except (ValueError, KeyError, jsonschema.ValidationError) as error:
                faults.append({"wanted": wanted.fields, "answer": choice, "error": repr(error)[:200]})
            body["messages"] = [{"role": "user", "content": question + wanted.words}]
            _, free_tpot_s = _ask(client, {**body, "max_tokens": num_tokens, "ignore_eos": True})
            if held_tpot_s and free_tpot_s:
                held_s.append(held_tpot_s)
                free_s.append(free_tpot_s)
                ratios.append(held_tpot_s / free_tpot_s)
            progress(number + 1, schemas)
    return {
        "schemas": schemas,
        "valid": num_valid,
        "valid_share": num_valid / schemas,
        "decode_slowdown": statistics.median(ratios) - 1 if ratios else None,
        "held_tpot_s": statistics.median(held_s) if held_s else None,
        "free_tpot_s": statistics.median(free_s) if free_s else None,
        "pairs": len(ratios),
        "faults": faults,
    }


def _ask(client: httpx.Client, body: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The answer, and the seconds that each token after the first took on the worker; None for a very short one."""
    answer = client.post("/v1/chat/completions", json=body).raise_for_status()
    whole: dict[str, Any] = answer.json()
    num_decoded = whole["usage"]["completion_tokens"] - 1
    if num_decoded < 4:
        return whole, None
    deadline = time.monotonic() + _REPORT_S
    while time.monotonic() < deadline:
        record = client.get(f"/api/requests/{answer.headers['x-request-id']}").raise_for_status().json()
        spent = [
            p["duration_s"] for p in record["timeline"] if p["phase"] == "decode" and p["where"] != "gateway"
        ]
        if spent:
            return whole, float(sum(spent)) / num_decoded
        time.sleep(0.02)
    return whole, None
