"""The gateway's end of a link: what a worker says of a request that was cancelled meanwhile still counts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.routing.link import Link
from engine.protocol import (
    Cancel,
    Finished,
    FromWorker,
    Report,
    SamplingParams,
    Submit,
    Tokens,
    decode_to_worker,
    encode,
)


class _Worker:
    """A channel whose worker says what it is told to say."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[object] = asyncio.Queue()
        self._says: asyncio.Queue[bytes] = asyncio.Queue()

    @asynccontextmanager
    async def open(self, _url: str) -> AsyncIterator["_Worker"]:
        yield self

    async def send(self, data: bytes) -> None:
        for message in decode_to_worker(data):
            self.heard.put_nowait(message)

    async def receive(self) -> bytes:
        return await self._says.get()

    def say(self, *events: FromWorker) -> None:
        self._says.put_nowait(encode(list(events)))


class _Sink:
    def __init__(self) -> None:
        self.events: asyncio.Queue[FromWorker] = asyncio.Queue()

    def on_event(self, event: FromWorker) -> None:
        self.events.put_nowait(event)

    def on_lost(self) -> None:
        raise AssertionError("the link was not lost")


async def test_tokens_on_their_way_when_a_request_is_cancelled_reach_its_sink() -> None:
    worker, sink = _Worker(), _Sink()
    link = Link("both-0", "ws://test", worker.open)
    running = asyncio.create_task(link.run(lambda: None))
    submit = Submit(
        request_id="r", phase="both", prompt_tokens=[1], sampling=SamplingParams(max_tokens=9, seed=0)
    )
    link.submit(submit, sink)
    async with asyncio.timeout(5):
        assert await worker.heard.get() == submit
        link.cancel("r")
        assert link.num_in_flight == 0
        assert await worker.heard.get() == Cancel(request_id="r")
        tokens = Tokens(request_id="r", token_ids=[7, 8], logprobs=None)
        report = Report(
            worker_id="both-0", cached_tokens=0, local_tokens=0, computed_tokens=1, phases=[], transfers=[]
        )
        last = Finished(request_id="r", finish_reason="abort", report=report)
        worker.say(tokens, last)
        assert [await sink.events.get(), await sink.events.get()] == [tokens, last]
        worker.say(tokens, Tokens(request_id="r", token_ids=[9], logprobs=None))
        submit = Submit(
            request_id="s", phase="both", prompt_tokens=[1], sampling=SamplingParams(max_tokens=9, seed=0)
        )
        link.submit(submit, sink)
        worker.say(Tokens(request_id="s", token_ids=[5], logprobs=None))
        # After its last word a request is forgotten: the next event is the other request's.
        assert (await sink.events.get()).request_id == "s"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
