"""The load client over connections it keeps: where an answer ends, and what becomes of the connection."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import pytest

from app.bench.client import Outcome, StreamingClient

EVENT = b'data: {"choices":[{"text":"0\\r\\n\\r\\n","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
# A body in whose middle stands what its end looks like.
FALSE_END = b": 0\r\n\r\n" + EVENT


def chunked(*chunks: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def refusal() -> bytes:
    body = json.dumps({"error": {"message": "later"}}).encode()
    head = b"HTTP/1.1 429 Too Many Requests\r\nretry-after-ms: 1500\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class Server:
    """Gives the n-th request what `answers(n)` says, each piece a packet of its own; at an empty one it hangs up."""

    def __init__(self, answers: Callable[[int], list[bytes]]) -> None:
        self.answers = answers
        self.num_connections = self.num_requests = 0
        self.url = ""
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                )
                await reader.readexactly(int(length.split(b":")[1]))
                self.num_requests += 1
                for piece in self.answers(self.num_requests):
                    if not piece:
                        return writer.close()
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.002)  # a packet of its own


@contextlib.asynccontextmanager
async def serving(
    answers: Callable[[int], list[bytes]],
) -> AsyncIterator[tuple[Server, StreamingClient]]:
    server = Server(answers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    client = StreamingClient(url, api_key=None, timeout_s=5, keeps_connections=True)
    try:
        yield server, client
    finally:
        client.close()
        for writer in server.writers:
            writer.close()
        listening.close()


async def stream(client: StreamingClient) -> Outcome:
    return await client.stream("/completions", b"{}")


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_an_answer_ends_where_it_ends_however_it_is_cut(size: int) -> None:
    whole = chunked(FALSE_END[: FALSE_END.index(b"0") + 5], FALSE_END[FALSE_END.index(b"0") + 5 :])
    cut = [whole[at : at + size] for at in range(0, len(whole), size)]
    async with serving(lambda _: cut) as (server, client):
        outcomes = [await stream(client) for _ in range(3)]
    assert [(o.error, o.text, o.finish_reason) for o in outcomes] == [(None, "0\r\n\r\n", "stop")] * 3
    assert (server.num_connections, server.num_requests) == (1, 3)


async def test_a_refusal_leaves_the_connection_open() -> None:
    async with serving(lambda _: [refusal()]) as (server, client):
        outcomes = [await stream(client) for _ in range(3)]
    assert [(o.status, o.retry_after_s, o.error) for o in outcomes] == [(429, 1.5, "status 429: later")] * 3
    assert server.num_connections == 1


async def test_at_the_same_time_each_has_its_own_connection() -> None:
    async with serving(lambda _: [chunked(EVENT)]) as (server, client):
        outcomes = await asyncio.gather(*(stream(client) for _ in range(4)))
        outcomes += await asyncio.gather(*(stream(client) for _ in range(4)))
    assert [o.error for o in outcomes] == [None] * 8
    assert server.num_connections == 4


async def test_a_connection_that_the_server_gave_up_is_replaced() -> None:
    # The second request's connection is closed without a word, as when it was idle for too long.
    async with serving(lambda number: [b""] if number == 2 else [chunked(EVENT)]) as (server, client):
        outcomes = [await stream(client) for _ in range(3)]
    assert [o.error for o in outcomes] == [None] * 3
    assert (server.num_connections, server.num_requests) == (2, 4)


async def test_an_answer_that_breaks_off_is_an_error_and_not_asked_for_again() -> None:
    async with serving(lambda number: [chunked(EVENT)] if number == 1 else [chunked(EVENT)[:-30], b""]) as (
        server,
        client,
    ):
        outcomes = [await stream(client) for _ in range(2)]
    assert [o.error is None for o in outcomes] == [True, False]
    assert outcomes[1].error == "ConnectionResetError: the connection was closed"
    assert (server.num_connections, server.num_requests) == (1, 2)


async def test_without_keeping_every_request_has_its_connection() -> None:
    async with serving(lambda _: [chunked(EVENT)]) as (server, client):
        single = StreamingClient(f"http://127.0.0.1:{client._port}", api_key=None, timeout_s=5)
        outcomes = [await stream(single) for _ in range(3)]
    assert [o.error for o in outcomes] == [None] * 3
    assert server.num_connections == 3
