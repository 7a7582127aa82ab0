"""Real worker processes on the real model, and a synchronous end of their link."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from websockets.sync.client import connect

from engine.protocol import (
    BlocksPublished,
    Cancel,
    Failed,
    Finished,
    FromWorker,
    Prefetch,
    Prefilled,
    Report,
    SamplingParams,
    Submit,
    TokenLogprob,
    Tokens,
    WorkerRecord,
    decode_from_worker,
    encode,
)
from memory_pool.directory import Directory

START_TIMEOUT_S = 150.0
"""Covers compiling the kernels on their first use."""


class WorkerProcess:
    """`python -m engine.server`, ready to serve."""

    def __init__(self, worker_id: str, role: str, model: Path, redis_url: str, log: Path, *args: str) -> None:
        self.id = worker_id
        self.log = log
        self._directory = Directory(redis_url)
        argv = [sys.executable, "-m", "engine.server", "--id", worker_id, "--role", role, "--model", "test"]
        argv += [
            "--model-path",
            str(model),
            "--threads",
            "1",
            "--kv-bytes",
            str(256 << 20),
            "--exit-with-parent",
        ]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*argv, *args],
                stdout=output,
                stderr=output,
                env={**os.environ, "CLOUDMATRIX_REDIS_URL": redis_url},
            )

    @property
    def record(self) -> WorkerRecord | None:
        data = self._directory.members().get(self.id)
        return None if data is None else msgspec.msgpack.decode(data, type=WorkerRecord)

    def wait_ready(self) -> "WorkerProcess":
        self.until(lambda: (record := self.record) is not None and record.state == "ready", START_TIMEOUT_S)
        return self

    def until(self, condition: Callable[[], bool], within_s: float = 20) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self._directory.close()

    @contextlib.contextmanager
    def link(self) -> Iterator["Link"]:
        record = self.record
        assert record is not None
        with connect(
            record.url.replace("http", "ws") + "/link", compression=None, max_size=None, proxy=None
        ) as socket:
            yield Link(socket)


class Link:
    """What the gateway would do, one request or many at a time."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.events: dict[str, list[FromWorker]] = {}

    def send(self, *messages: Submit | Cancel | Prefetch) -> None:
        self._socket.send(encode(list(messages)))

    def receive(self, timeout_s: float = 60) -> list[FromWorker]:
        events = decode_from_worker(self._socket.recv(timeout=timeout_s, decode=False))
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)
        return events

    def finish(self, *request_ids: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(self.is_over(r) for r in request_ids):
            self.receive(deadline - time.monotonic())

    def is_over(self, request_id: str) -> bool:
        return any(isinstance(e, Finished | Failed | Prefilled) for e in self.events.get(request_id, []))

    def tokens(self, request_id: str) -> list[int]:
        return [t for e in self.events.get(request_id, []) if isinstance(e, Tokens) for t in e.token_ids]

    def logprobs(self, request_id: str) -> list[TokenLogprob]:
        events = self.events.get(request_id, [])
        return [p for e in events if isinstance(e, Tokens) for p in e.logprobs or ()]

    def published(self, request_id: str) -> list[bytes]:
        events = self.events.get(request_id, [])
        return [k for e in events if isinstance(e, BlocksPublished) for k in e.block_keys]

    def last(self, request_id: str) -> FromWorker:
        return self.events[request_id][-1]

    def report(self, request_id: str) -> Report:
        last = self.last(request_id)
        assert isinstance(last, Finished | Prefilled), last
        return last.report


def request(request_id: str, prompt: list[int], *, max_tokens: int = 24, **fields: Any) -> Submit:
    """Greedy and going on to `max_tokens`, unless told otherwise."""
    sampling = {"seed": 7, "temperature": 0.0, "max_tokens": max_tokens, **fields.pop("sampling", {})}
    return Submit(
        request_id=request_id,
        prompt_tokens=prompt,
        sampling=SamplingParams(**sampling),
        **{"phase": "both", **fields},
    )


def hand_over(prefill: Link, decode: Link, submit: Submit) -> list[int]:
    """Serve a request on two workers; its tokens."""
    prefill.send(msgspec.structs.replace(submit, phase="prefill"))
    prefill.finish(submit.request_id)
    first = prefill.tokens(submit.request_id)
    last = prefill.last(submit.request_id)
    if isinstance(last, Finished):
        return first
    assert isinstance(last, Prefilled), last
    decode.send(msgspec.structs.replace(submit, phase="decode", generated_tokens=first, handoff=last.handoff))
    decode.finish(submit.request_id)
    return first + decode.tokens(submit.request_id)
