"""Recorded workloads: Mooncake JSONL (with prefix blocks of 512 tokens) and Azure CSV (without).

Bad lines are refused with the file and the line: nothing is skipped or sorted in silence.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from app.twin.errors import TwinError

BLOCK_TOKENS = 512
"""Tokens of one of Mooncake's hashed blocks."""
MOONCAKE_KEYS = {"timestamp", "input_length", "output_length", "hash_ids"}
AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace; `blocks` name its prompt's 512-token blocks, empty when the trace has no names."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read(path: Path, speedup: float = 1.0) -> list[Request]:
    """All requests, in order of arrival, starting at 0 s; `speedup` 2 lets them come twice as fast.

    Raises `TwinError` naming the file and line of what is malformed, impossible or out of order.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            azure = first.strip().startswith("TIMESTAMP")
            numbered = list(_azure(path, file) if azure else _mooncake(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise TwinError(f"trace {path}: {error}") from None
    if not numbered:
        raise TwinError(f"trace {path}: no requests in it")
    for (_, earlier), (line, later) in pairwise(numbered):
        if later.arrival_s < earlier.arrival_s:
            raise TwinError(
                f"trace {path}, line {line}: arrives before the line above it; sort the trace by time"
            )
    start_s = numbered[0][1].arrival_s
    return [
        Request((r.arrival_s - start_s) / speedup, r.prompt_tokens, r.output_tokens, r.blocks)
        for _, r in numbered
    ]


def _mooncake(path: Path, lines: Any) -> Iterator[tuple[int, Request]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"trace {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TwinError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise TwinError(f"{where}: expected an object, found {type(row).__name__}")
        missing = {"timestamp", "input_length", "output_length"} - row.keys()
        if missing:
            raise TwinError(f"{where}: key {sorted(missing)[0]!r} is missing")
        blocks = row.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(
            isinstance(b, int) and not isinstance(b, bool) for b in blocks
        ):
            raise TwinError(f"{where}: key 'hash_ids' is not a list of whole numbers")
        prompt = _whole(row["input_length"], "input_length", where, at_least=1)
        if len(blocks) * BLOCK_TOKENS >= prompt + BLOCK_TOKENS:
            raise TwinError(
                f"{where}: key 'hash_ids' has {len(blocks)} blocks of {BLOCK_TOKENS} tokens for input_length {prompt}"
            )
        timestamp = row["timestamp"]
        if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not timestamp >= 0:
            raise TwinError(f"{where}: key 'timestamp' is {timestamp!r}, not milliseconds from 0")
        output = _whole(row["output_length"], "output_length", where, at_least=1)
        yield number, Request(timestamp / 1e3, prompt, output, tuple(blocks))


def _azure(path: Path, lines: Any) -> Iterator[tuple[int, Request]]:
    reader = csv.reader(lines)
    header = next(reader)
    if [column.strip() for column in header] != AZURE_COLUMNS:
        raise TwinError(f"trace {path}, line 1: expected the columns {','.join(AZURE_COLUMNS)}")
    for row in reader:
        where = f"trace {path}, line {reader.line_num}"
        if len(row) != len(AZURE_COLUMNS):
            raise TwinError(f"{where}: {len(row)} columns instead of {len(AZURE_COLUMNS)}")
        try:
            # The trace writes seven decimals; datetime takes six.
            seconds, dot, decimals = row[0].partition(".")
            at = datetime.fromisoformat(f"{seconds}{dot}{decimals[:6]}").replace(tzinfo=UTC).timestamp()
        except ValueError:
            raise TwinError(f"{where}: TIMESTAMP {row[0]!r} is not a date and time") from None
        prompt = _whole(row[1], "ContextTokens", where, at_least=1)
        yield (
            reader.line_num,
            Request(at, prompt, max(1, _whole(row[2], "GeneratedTokens", where, at_least=0)), ()),
        )


def _whole(value: Any, key: str, where: str, *, at_least: int) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise TwinError(f"{where}: key {key!r} is {value!r}, not a whole number from {at_least}")
    return value
