"""A worker without an engine: the real protocol over a real WebSocket, answering with the prompt again and again.

Token `i` of an answer is `prompt_tokens[i % len(prompt_tokens)]` whatever worker produces it, so a gap or repetition
after a failover shows. As a program it measures what the gateway itself costs:

    python -m tests.app.echo_worker --redis URL --role both --step-s 0.002
"""

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from engine.protocol import (
    BlocksPublished,
    Cancel,
    Failed,
    Finished,
    FromWorker,
    Handoff,
    Location,
    Phase,
    Prefetch,
    Prefilled,
    Report,
    Role,
    Submit,
    TokenLogprob,
    Tokens,
    WorkerRecord,
    decode_to_worker,
    encode,
)
from fabric.ledger import price
from memory_pool.directory import AsyncDirectory
from memory_pool.keys import block_keys, tail_key

BLOCK_TOKENS = 32
FINGERPRINT = "00" * 32
Refuse = Callable[[Submit], Failed | None]


@dataclass(eq=False)
class _Sequence:
    submit: Submit
    connection: ServerConnection
    received_at: float
    tokens: list[int]


@dataclass(eq=False)
class EchoWorker:
    """One echo worker. `step_s` is how long an engine step takes; `refuse` may decline a Submit."""

    id: str
    role: Role
    model: str = "smollm2-135m"
    step_s: float = 0.0
    max_context_tokens: int = 8192
    refuse: Refuse = lambda _: None
    url: str = ""
    state: str = "ready"
    submits: list[Submit] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    prefetches: list[Prefetch] = field(default_factory=list)
    report_delay_s: float = 0.0
    """How long after the last token the report comes, as when blocks are still being published."""
    num_produced: int = 0
    """Tokens sent, of all requests."""
    is_held: bool = False
    """While true, no step is run: everything waits."""
    _sequences: dict[str, _Sequence] = field(default_factory=dict)
    _connections: set[ServerConnection] = field(default_factory=set)
    _late: set[asyncio.Task[None]] = field(default_factory=set)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def record(self) -> WorkerRecord:
        return WorkerRecord(
            id=self.id,
            role=self.role,
            state=self.state,  # type: ignore[arg-type]  # tests set strings
            model=self.model,
            fingerprint=FINGERPRINT,
            pid=1,
            url=self.url,
            location=Location(node=0 if self.role == "prefill" else 12, npu=0, die=0),
            block_tokens=BLOCK_TOKENS,
            kv_bytes_per_token=23040,
            max_context_tokens=self.max_context_tokens,
            running=len(self._sequences),
            waiting=0,
            queued_tokens=0,
            kv_blocks_used=0,
            kv_blocks_total=1000,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["EchoWorker"]:
        server = await serve(self._serve, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None)
        async with server:
            port = next(iter(server.sockets)).getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            engine = asyncio.create_task(self._engine())
            try:
                yield self
            finally:
                engine.cancel()
                for connection in list(self._connections):
                    connection.transport.abort()

    async def die(self) -> None:
        """Drop every connection at once, as a killed process does, and forget everything."""
        self._sequences.clear()
        for connection in list(self._connections):
            connection.transport.abort()
        self._connections.clear()

    async def _serve(self, connection: ServerConnection) -> None:
        self._connections.add(connection)
        try:
            async for data in connection:
                assert isinstance(data, bytes)
                for message in decode_to_worker(data):
                    await self._take(message, connection)
        except ConnectionClosed:
            pass
        finally:
            self._connections.discard(connection)
            for key in [k for k, s in self._sequences.items() if s.connection is connection]:
                del self._sequences[key]

    async def _take(self, message: Submit | Cancel | Prefetch, connection: ServerConnection) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                refusal = self.refuse(message)
                if refusal is not None:
                    refused: list[FromWorker] = [refusal]
                    await connection.send(encode(refused))
                    return
                self._sequences[message.request_id] = _Sequence(
                    message, connection, time.perf_counter(), list(message.generated_tokens)
                )
                self._wake.set()
            case Cancel():
                self.cancels.append(message.request_id)
                sequence = self._sequences.pop(message.request_id, None)
                if sequence is not None:
                    report = self._report(sequence)
                    over: list[FromWorker] = [
                        Finished(request_id=message.request_id, finish_reason="abort", report=report)
                    ]
                    await connection.send(encode(over))
            case Prefetch():
                self.prefetches.append(message)

    async def _engine(self) -> None:
        while True:
            if not self._sequences or self.is_held:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), 0.02)
                continue
            await asyncio.sleep(self.step_s)
            outbox: dict[ServerConnection, list[FromWorker]] = {}
            for sequence in list(self._sequences.values()):
                outbox.setdefault(sequence.connection, []).extend(self._step(sequence))
            for connection, events in outbox.items():
                with contextlib.suppress(ConnectionClosed):
                    await connection.send(encode(events))

    def _step(self, sequence: _Sequence) -> list[FromWorker]:
        submit = sequence.submit
        prompt, request_id = submit.prompt_tokens, submit.request_id
        token = prompt[len(sequence.tokens) % len(prompt)]
        sequence.tokens.append(token)
        self.num_produced += 1
        logprobs = None
        if submit.sampling.logprobs is not None:
            top = [(token + i, -0.5 - i) for i in range(submit.sampling.logprobs)]
            logprobs = [TokenLogprob(token, -0.5, top)]
        events: list[FromWorker] = [Tokens(request_id=request_id, token_ids=[token], logprobs=logprobs)]
        reason = None
        if token in submit.sampling.stop_token_ids:
            reason = "stop"
        elif len(sequence.tokens) >= submit.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            del self._sequences[request_id]
            finished = Finished(
                request_id=request_id,
                finish_reason=reason,  # type: ignore[arg-type]  # one of its literals
                report=self._report(sequence),
            )
            if self.report_delay_s:
                later = asyncio.create_task(self._send_later(sequence.connection, finished))
                self._late.add(later)
                later.add_done_callback(self._late.discard)
                return events
            return [*events, finished]
        if submit.phase != "prefill":
            return events
        del self._sequences[request_id]
        keys = block_keys(
            prompt, block_tokens=BLOCK_TOKENS, fingerprint=FINGERPRINT, namespace=submit.namespace
        )
        handoff = Handoff(block_keys=keys, tail_key=tail_key(request_id, "default"), num_tokens=len(prompt))
        if keys:
            events.append(BlocksPublished(request_id=request_id, block_keys=keys))
        return [*events, Prefilled(request_id=request_id, handoff=handoff, report=self._report(sequence))]

    async def _send_later(self, connection: ServerConnection, event: FromWorker) -> None:
        await asyncio.sleep(self.report_delay_s)
        late: list[FromWorker] = [event]
        with contextlib.suppress(ConnectionClosed):
            await connection.send(encode(late))

    def _report(self, sequence: _Sequence) -> Report:
        elapsed_s = time.perf_counter() - sequence.received_at
        name = "prefill" if sequence.submit.phase == "prefill" else "decode"
        num_bytes = len(sequence.submit.prompt_tokens) * 23040
        return Report(
            worker_id=self.id,
            cached_tokens=len(sequence.submit.prompt_tokens) // BLOCK_TOKENS * BLOCK_TOKENS,
            local_tokens=0,
            computed_tokens=1,
            phases=[
                Phase(phase="queue", start_s=0.0, duration_s=0.0),
                Phase(phase=name, start_s=0.0, duration_s=elapsed_s),
            ],
            transfers=[
                price("publish" if name == "prefill" else "fetch", "die:0", "cpu:1", num_bytes, 0.001)
            ],
        )


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--role", default="both")
    parser.add_argument("--id", default="echo-0")
    parser.add_argument("--step-s", type=float, default=0.0)
    options = parser.parse_args()
    directory = AsyncDirectory(options.redis)
    async with EchoWorker(options.id, options.role, step_s=options.step_s).running() as worker:
        while True:
            await directory.announce(worker.id, msgspec.msgpack.encode(worker.record()), ttl_s=5)
            await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(_main())
