"""`python -m app.bench.echo_worker`: a worker without an engine, so that what remains of a request is the gateway.

It speaks the real protocol over a real WebSocket and answers with the prompt's tokens again and again, one token per
sequence and step. Stop tokens among them are left out: the first would end the answer for the gateway, while this
worker went on to its `max_tokens`, so that of 128 tokens 18 were streamed and the rest was work for nothing.
"""

import argparse
import asyncio
import contextlib
import os
from dataclasses import dataclass

import msgspec
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from engine.lifeline import exit_with_parent
from engine.protocol import (
    Cancel,
    Finished,
    FromWorker,
    Location,
    Phase,
    Report,
    Submit,
    Tokens,
    WorkerRecord,
    decode_to_worker,
    encode,
)
from memory_pool.directory import AsyncDirectory

ANNOUNCE_S = 1.0
TTL_S = 4.0


@dataclass(slots=True)
class _Sequence:
    """What is said again and again, and how often it was."""

    submit: Submit
    tokens: list[int]
    num_said: int = 0

    @classmethod
    def of(cls, submit: Submit) -> "_Sequence":
        stops = submit.sampling.stop_token_ids
        return cls(submit, [token for token in submit.prompt_tokens if token not in stops] or [0])

    def say(self) -> int:
        self.num_said += 1
        return self.tokens[(self.num_said - 1) % len(self.tokens)]


class EchoWorker:
    """One worker of role `both`; `step_s` is how long a step takes, 0 none at all."""

    def __init__(self, worker_id: str, model: str, step_s: float) -> None:
        self._id = worker_id
        self._model = model
        self._step_s = step_s
        self._sequences: dict[tuple[ServerConnection, str], _Sequence] = {}
        self._work = asyncio.Event()

    async def run(self, directory: AsyncDirectory) -> None:
        """Serve on a free port and announce it, until cancelled."""
        async with serve(
            self._serve, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None
        ) as server:
            url = f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            async with asyncio.TaskGroup() as group:
                group.create_task(self._step_forever())
                while True:
                    await directory.announce(self._id, msgspec.msgpack.encode(self._record(url)), ttl_s=TTL_S)
                    await asyncio.sleep(ANNOUNCE_S)

    def _record(self, url: str) -> WorkerRecord:
        return WorkerRecord(
            id=self._id,
            role="both",
            state="ready",
            model=self._model,
            fingerprint="00" * 32,
            pid=os.getpid(),
            url=url,
            location=Location(node=0, npu=0, die=0),
            block_tokens=32,
            kv_bytes_per_token=1,
            max_context_tokens=8192,
            running=len(self._sequences),
            waiting=0,
            queued_tokens=0,
            kv_blocks_used=0,
            kv_blocks_total=1024,
        )

    async def _serve(self, connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in connection:
                assert isinstance(data, bytes)
                for message in decode_to_worker(data):
                    if isinstance(message, Submit):
                        self._sequences[connection, message.request_id] = _Sequence.of(message)
                        self._work.set()
                    elif isinstance(message, Cancel):
                        self._sequences.pop((connection, message.request_id), None)
        for key in [key for key in self._sequences if key[0] is connection]:
            del self._sequences[key]

    async def _step_forever(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(self._step_s)
            outboxes: dict[ServerConnection, list[FromWorker]] = {}
            for (connection, request_id), sequence in list(self._sequences.items()):
                events = outboxes.setdefault(connection, [])
                events.append(Tokens(request_id=request_id, token_ids=[sequence.say()]))
                if sequence.num_said < sequence.submit.sampling.max_tokens:
                    continue
                del self._sequences[connection, request_id]
                report = self._report(sequence.submit)
                events.append(Finished(request_id=request_id, finish_reason="length", report=report))
            if not self._sequences:
                self._work.clear()
            for connection, events in outboxes.items():
                with contextlib.suppress(ConnectionClosed):
                    await connection.send(encode(events))

    def _report(self, submit: Submit) -> Report:
        phases = [Phase(phase=name, start_s=0.0, duration_s=0.0) for name in ("queue", "prefill", "decode")]
        return Report(
            worker_id=self._id,
            cached_tokens=0,
            local_tokens=0,
            computed_tokens=len(submit.prompt_tokens),
            phases=phases,
            transfers=[],
        )


def main() -> None:
    """Run until the parent goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--id", default="echo-0")
    parser.add_argument("--step-s", type=float, default=0.0)
    options = parser.parse_args()
    exit_with_parent()
    directory = AsyncDirectory(os.environ["CLOUDMATRIX_REDIS_URL"])
    asyncio.run(EchoWorker(options.id, options.model, options.step_s).run(directory))


if __name__ == "__main__":
    main()
