"""The worker behind which the gateway's own cost is measured."""

import asyncio
import contextlib

import msgspec
from websockets.asyncio.client import connect

from app.bench.echo_worker import EchoWorker
from engine.protocol import (
    Finished,
    FromWorker,
    SamplingParams,
    Submit,
    Tokens,
    WorkerRecord,
    decode_from_worker,
    encode,
)


class Directory:
    def __init__(self) -> None:
        self.announced: asyncio.Queue[bytes] = asyncio.Queue()

    async def announce(self, _member_id: str, record: bytes, *, ttl_s: float) -> None:
        self.announced.put_nowait(record)


async def said_to(prompt_tokens: list[int], **sampling: object) -> list[FromWorker]:
    directory = Directory()
    running = asyncio.create_task(EchoWorker("echo-0", "m", 0.0).run(directory))  # type: ignore[arg-type]
    events: list[FromWorker] = []
    try:
        async with asyncio.timeout(10):
            url = msgspec.msgpack.decode(await directory.announced.get(), type=WorkerRecord).url
            params = SamplingParams(seed=0, **sampling)  # type: ignore[arg-type]
            submit = Submit(request_id="r", phase="both", prompt_tokens=prompt_tokens, sampling=params)
            async with connect(url.replace("http", "ws", 1) + "/link", proxy=None) as link:
                await link.send(encode([submit]))
                while not events or not isinstance(events[-1], Finished):
                    events += decode_from_worker(await link.recv(decode=False))
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    return events


async def test_it_answers_with_the_prompt_as_long_as_was_asked_and_never_with_a_stop_token() -> None:
    *tokens, last = await said_to([5, 2, 6], max_tokens=5, stop_token_ids=(2,))
    assert [event.token_ids for event in tokens if isinstance(event, Tokens)] == [[5], [6], [5], [6], [5]]
    assert isinstance(last, Finished)
    assert last.finish_reason == "length"


async def test_a_prompt_of_stop_tokens_has_an_answer_too() -> None:
    *tokens, _ = await said_to([2], max_tokens=2, stop_token_ids=(2,))
    assert [event.token_ids for event in tokens if isinstance(event, Tokens)] == [[0], [0]]
