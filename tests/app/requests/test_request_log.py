"""The request log: no prompts in it, put aside when full, and a trace for the twin in the end."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.requests.mooncake import RequestLogError, mooncake_lines, read_log
from app.requests.record import RequestRecord
from app.requests.request_log import RequestLog
from app.twin.trace import read as read_trace
from memory_pool.keys import block_keys


def record(request_id: str, *, tokens: int, answer: int, arrived_at: float) -> RequestRecord:
    made = RequestRecord(request_id, "chat", 1, arrived_at=0.0)
    made.created_s, made.prompt_tokens, made.completion_tokens = arrived_at, tokens, answer
    made.model = "m"
    made.end("completed", 2.0)
    return made


def keys(tokens: list[int]) -> list[list[bytes]]:
    return [block_keys(tokens, block_tokens=32, fingerprint="f", namespace="n")]


def test_round_trip_into_a_trace_that_the_twin_reads(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path)
    shared = list(range(1024))
    # 1,024 shared tokens are two blocks of 512; what follows differs, 100 tokens in a third block each.
    for number in range(2):
        tokens = shared + [9000 + number] * 100
        made = record(f"req_{number}", tokens=1124, answer=7 + number, arrived_at=1000.0 + 1.5 * number)
        log.write(made, keys(tokens), 32)
    log.write(record("req_alone", tokens=512, answer=3, arrived_at=1009.0), keys(shared[:512]), 32)
    log.write(record("req_failed", tokens=512, answer=0, arrived_at=1010.0), keys(shared[:512]), 32)
    log.close()
    out = tmp_path / "trace.jsonl"
    result = CliRunner().invoke(app, ["requests", "export", "--mooncake", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    trace = read_trace(out)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace] == [
        (0.0, 1124, 7),
        (1.5, 1124, 8),
        (9.0, 512, 3),
    ]
    assert [r.blocks for r in trace] == [(0, 1, 2), (0, 1, 3), (0,)]


def test_full_files_are_put_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, max_bytes=800, kept_files=2)
    for number in range(12):
        log.write(record(f"req_{number:02}", tokens=3, answer=1, arrived_at=float(number)), [[]], 32)
    log.close()
    files = [tmp_path / "requests.jsonl.2", tmp_path / "requests.jsonl.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(0 < file.stat().st_size <= 800 for file in files)
    ids = [row["request_id"] for row in read_log(files)]
    # The newest ones, without a gap.
    assert ids == [f"req_{number:02}" for number in range(12 - len(ids), 12)]
    assert path.stat().st_mode & 0o077 == 0


def test_several_prompts_in_one_call_are_left_out_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path)
    log.write(record("req_1", tokens=64, answer=3, arrived_at=0.0), keys([1] * 32) * 2, 32)
    log.close()
    assert list(mooncake_lines(read_log([path]))) == []
    path.write_text(path.read_text() + json.dumps({"request_id": "x"}) + "\n")
    with pytest.raises(RequestLogError, match="line 2"):
        read_log([path])
