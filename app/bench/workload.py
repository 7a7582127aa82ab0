"""What a load test sends and when: prompts in a closed or open loop, or the requests of a recorded trace."""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of a Mooncake trace's `hash_ids` stands for."""
TOKEN_RANGE = (1000, 30000)
"""Ids that made-up prompts are drawn from: ordinary text tokens in every vocabulary of 32,000 or more."""

DEFAULT_PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "Write a short poem about the sea.",
    "List five uses of a paper clip.",
    "Tell me about the history of bread.",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What should I see in Kyoto in one day?",
)


class WorkloadError(ValueError):
    """A prompts or trace file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to send. `due_s`: seconds after the start, None in a closed loop."""

    path: str
    body: bytes
    due_s: float | None = None


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request. `block_ids`: names of its prompt's 512-token blocks, None when the trace has none."""

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] | None


def prompt_calls(
    prompts: Sequence[dict[str, Any]],
    common: dict[str, Any],
    num_requests: int,
    rate: float | None,
    seed: int,
) -> Iterator[Call]:
    """`num_requests` calls over the prompts in turn; with `rate`, due at Poisson arrivals of that many a second."""
    draw = random.Random(seed)  # noqa: S311 - arrivals, not secrets
    due_s = 0.0
    for number in range(num_requests):
        prompt = prompts[number % len(prompts)]
        path = "/chat/completions" if "messages" in prompt else "/completions"
        yield Call(path, _body({**common, **prompt}), due_s if rate else None)
        if rate:
            due_s += draw.expovariate(rate)


def trace_calls(
    rows: Sequence[TraceRow], common: dict[str, Any], *, speed: float, max_context_tokens: int | None
) -> Iterator[Call]:
    """The requests of a trace at their times, `speed` times as fast, with made-up tokens of the recorded lengths.

    Equal `block_ids` give equal tokens, so a trace's prefix sharing is kept. A request longer than the model's
    context is cut to fit it.
    """
    for number, row in enumerate(rows):
        output_tokens, input_tokens = max(1, row.output_tokens), max(1, row.input_tokens)
        if max_context_tokens is not None:
            output_tokens = min(output_tokens, max_context_tokens // 2)
            input_tokens = min(input_tokens, max_context_tokens - output_tokens)
        blocks = row.block_ids if row.block_ids is not None else (f"request {number}",)
        tokens: list[int] = []
        for block in blocks:
            if len(tokens) >= input_tokens:
                break
            length = MOONCAKE_BLOCK_TOKENS if row.block_ids is not None else input_tokens
            draw = random.Random(str(block))  # noqa: S311 - filler text, not secrets
            tokens.extend(draw.choices(range(*TOKEN_RANGE), k=length))
        body = {**common, "prompt": tokens[:input_tokens], "max_tokens": output_tokens, "ignore_eos": True}
        yield Call("/completions", _body(body), row.at_s / speed)


def read_prompts(path: Path | None) -> list[dict[str, Any]]:
    """Prompts of a file, each `{"messages": …}` or `{"prompt": …}`. Raises WorkloadError.

    A `.jsonl` line may hold `messages`, `prompt` or `turns` (the first is asked); other files hold one question a line.
    """
    if path is None:
        return [_question(text) for text in DEFAULT_PROMPTS]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: {error}") from None
    prompts = [
        _prompt_of(path, number, line) if path.suffix == ".jsonl" else _question(line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise WorkloadError(f"{path}: holds no prompt")
    return prompts


def read_trace(path: Path, limit: int | None) -> list[TraceRow]:
    """The first `limit` rows of a Mooncake JSONL or Azure CSV trace, in order of time. Raises WorkloadError."""
    rows: list[TraceRow] = []
    read_row = _azure_rows if path.suffix == ".csv" else _mooncake_rows
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in read_row(file):
                rows.append(row)
                if limit is not None and len(rows) >= limit:
                    break
    except OSError as error:
        raise WorkloadError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkloadError(f"{path}, request {len(rows) + 1}: {type(error).__name__}: {error}") from None
    if not rows:
        raise WorkloadError(f"{path}: holds no request")
    first_s = rows[0].at_s
    rows = [TraceRow(r.at_s - first_s, r.input_tokens, r.output_tokens, r.block_ids) for r in rows]
    return sorted(rows, key=lambda row: row.at_s)


def _mooncake_rows(lines: Iterator[str] | Any) -> Iterator[TraceRow]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            yield TraceRow(
                row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"])
            )


def _azure_rows(lines: Iterator[str] | Any) -> Iterator[TraceRow]:
    for row in csv.DictReader(lines):
        # Seven digits after the point, one more than Python reads.
        at_s = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
        yield TraceRow(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]), None)


def _prompt_of(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if isinstance(value, str):
            return _question(value)
        if "messages" in value:
            return {"messages": value["messages"]}
        if "turns" in value:
            return _question(value["turns"][0])
        return {"prompt": value["prompt"]}
    except (ValueError, KeyError, TypeError, IndexError):
        raise WorkloadError(
            f"{path}, line {number}: expected a JSON object with messages, prompt or turns"
        ) from None


def _question(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def _body(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
