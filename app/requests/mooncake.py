"""A request log as a trace in Mooncake's format, which `cloudmatrix twin replay` and `bench load --trace` read.

A line of the trace is `{"timestamp" (ms), "input_length", "output_length", "hash_ids"}`, where `hash_ids` has one
number for each 512 tokens of the prompt and equal numbers mean equal text up to there. The log names smaller
blocks, each by everything before it too, so the last of those within 512 tokens names them all.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512


class RequestLogError(ValueError):
    """A file is no request log; the message names the line."""


def read_log(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of some logs, in order of arrival. Raises RequestLogError."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestLogError(f"{path}: {error}") from None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                _ = row["arrived_at"] + row["prompt_tokens"] + row["completion_tokens"] + row["block_tokens"]
                _ = [len(chain) for chain in row["blocks"]]
            except (ValueError, KeyError, TypeError):
                raise RequestLogError(f"{path}, line {number}: not a line of a request log") from None
            rows.append(row)
    return sorted(rows, key=lambda row: float(row["arrived_at"]))


def mooncake_lines(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The trace of a log's `rows`, the first request at 0 ms.

    Left out are requests that made no token, and calls of several prompts, of which the log has but the sum of lengths.
    """
    names: dict[str, int] = {}
    began_at: float | None = None
    for row in rows:
        if not row["completion_tokens"] or len(row["blocks"]) != 1:
            continue
        began_at = row["arrived_at"] if began_at is None else began_at
        yield {
            "timestamp": round((row["arrived_at"] - began_at) * 1000),
            "input_length": row["prompt_tokens"],
            "output_length": max(1, row["completion_tokens"] // row["num_choices"]),
            "hash_ids": [
                names.setdefault(name, len(names))
                for name in _names(
                    row["blocks"][0], row["block_tokens"], row["prompt_tokens"], row["request_id"]
                )
            ],
        }


def _names(chain: list[str], block_tokens: int, num_tokens: int, request_id: str) -> Iterator[str]:
    """One name for each 512 tokens, the last of them perhaps not full."""
    for end in range(BLOCK_TOKENS, num_tokens + BLOCK_TOKENS, BLOCK_TOKENS):
        if end <= num_tokens and end % block_tokens == 0:
            yield chain[end // block_tokens - 1]
        elif num_tokens % block_tokens == 0 and end > num_tokens:
            yield chain[-1]
        else:
            yield f"{request_id}:{end}"  # ends in tokens that no full block names: nobody else's, as far as is known
