"""The request log: one JSON line for each request that is over, with counts, seconds and names of blocks, no prompts.

`cloudmatrix requests export --mooncake` makes a trace of it. The names of blocks are hashes under the tenant's own
salt: equal beginnings of prompts of one tenant can be seen, what they say cannot.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from app.requests.record import RequestRecord

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
KEPT_FILES = 4
"""Older files beside the current one: FILE.1 is the newest of them."""
HASH_BYTES = 8
"""Of each block's name: enough to tell the blocks of a log apart, too few to find a block in the pool."""


def line_of(
    record: RequestRecord, block_keys: Sequence[Sequence[bytes]], block_tokens: int
) -> dict[str, object]:
    """What the log says of a request. `block_keys`: of each of its prompts, the names of the full blocks."""
    return {
        "request_id": record.request_id,
        "arrived_at": record.created_s,
        "tenant": record.tenant,
        "model": record.model,
        "endpoint": record.endpoint,
        "status": record.status,
        "num_choices": record.num_choices,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "ttft_s": None
        if record.first_token_at is None
        else round(record.first_token_at - record.arrived_at, 6),
        "e2e_s": None if record.ended_at is None else round(record.ended_at - record.arrived_at, 6),
        "block_tokens": block_tokens,
        "blocks": [[key[:HASH_BYTES].hex() for key in keys] for keys in block_keys],
    }


class RequestLog:
    """A file of lines that is put aside when it is full. One process writes to it. Raises OSError when it cannot be
    opened; later failures are logged once, and requests go on."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, kept_files: int = KEPT_FILES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._kept_files = kept_files
        self._is_broken = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def write(self, record: RequestRecord, block_keys: Sequence[Sequence[bytes]], block_tokens: int) -> None:
        """A request is over."""
        line = json.dumps(line_of(record, block_keys, block_tokens), separators=(",", ":")) + "\n"
        try:
            if self._file.tell() and self._file.tell() + len(line) > self._max_bytes:
                self._rotate()
            self._file.write(line)
            self._file.flush()
            self._is_broken = False
        except OSError as error:
            if not self._is_broken:
                log.warning("the request log %s cannot be written: %s", self._path, error)
            self._is_broken = True

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _open(self) -> IO[str]:
        self._path.touch(mode=0o600)
        return self._path.open("a", encoding="utf-8")

    def _rotate(self) -> None:
        self._file.close()
        for number in range(self._kept_files, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)
        self._file = self._open()


def log_end(record: RequestRecord) -> None:
    """A line in the process's log for a request that is over."""
    if not log.isEnabledFor(logging.INFO):
        return
    ended_at = record.ended_at
    log.info(
        "request %s",
        record.status,
        extra={
            "request_id": record.request_id,
            "endpoint": record.endpoint,
            "tenant": record.tenant,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "e2e_s": None if ended_at is None else round(ended_at - record.arrived_at, 6),
        },
    )
