"""The channel that an event loop's tasks share: who asked gets the answer, whatever happens to the others."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop

from memory_pool.connection import AsyncConnection, endpoint_of
from memory_pool.redis_server import RedisServer
from memory_pool.resp import ChannelError, Endpoint, RefusedError
from memory_pool.shared_channel import SharedChannel
from memory_pool.store import StoreError, StoreFullError

ECHO = "return ARGV[1]"


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_two_hundred_tasks_get_their_own_answers_over_one_connection(
    redis_url: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def ask() -> None:
        channel = SharedChannel(endpoint_of(redis_url))
        before = await channel.call("INFO", "stats")
        words = [str(number).encode() for number in range(200)]
        assert await asyncio.gather(*(channel.call("EVAL", ECHO, 0, word) for word in words)) == words
        after = await channel.call("INFO", "stats")
        assert connections(after) == connections(before)
        channel.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask())


def connections(info: bytes) -> int:
    line = next(line for line in info.split(b"\r\n") if line.startswith(b"total_connections_received"))
    return int(line.partition(b":")[2])


async def test_an_error_is_of_the_one_who_asked_for_it(redis_url: str) -> None:
    channel = SharedChannel(endpoint_of(redis_url))
    wrong, right = await asyncio.gather(
        channel.call("EVAL", "nonsense(", 0), channel.call("EVAL", ECHO, 0, "x"), return_exceptions=True
    )
    assert isinstance(wrong, RefusedError)
    assert right == b"x"
    channel.close()


async def test_scripts_fail_as_the_store_does(own_redis: RedisServer) -> None:
    connection = AsyncConnection(own_redis.url, timeout_s=1.0)
    await connection.call("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreFullError):
        await connection.run("return redis.call('SET', KEYS[1], 'x')", ["k"])
    own_redis.stop()
    with pytest.raises(StoreError):
        await connection.run(ECHO, [], ["x"])
    await connection.close()


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(answer: Answer, *, timeout_s: float = 5.0) -> AsyncIterator[Endpoint]:
    """A server that does `answer` for each command it reads."""

    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"PING\r\n")
                await answer(writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as serving:
        yield Endpoint(port=serving.sockets[0].getsockname()[1], timeout_s=timeout_s)
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def test_a_connection_that_was_given_up_while_idle_costs_nothing() -> None:
    num_asked = 0

    async def leave_at_the_second(writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 2:
            writer.close()
        else:
            writer.write(b":%d\r\n" % num_asked)

    async with server(leave_at_the_second) as endpoint:
        channel = SharedChannel(endpoint)
        assert [await channel.call("PING") for _ in range(3)] == [1, 3, 4]
        channel.close()


async def test_the_answer_of_one_who_was_cancelled_goes_to_nobody() -> None:
    numbers = iter(range(9))
    first_asked = asyncio.Event()
    may_answer = asyncio.Event()

    async def count(writer: asyncio.StreamWriter) -> None:
        first_asked.set()
        await may_answer.wait()
        writer.write(b":%d\r\n" % next(numbers))

    async with server(count) as endpoint:
        channel = SharedChannel(endpoint)
        gone = asyncio.create_task(channel.call("PING"))
        await first_asked.wait()
        gone.cancel()
        staying = asyncio.create_task(channel.call("PING"))
        await asyncio.sleep(0)
        may_answer.set()
        assert await staying == 1
        channel.close()


async def test_a_silent_server_is_given_up_and_connected_to_anew() -> None:
    answers = iter([b"", b"+PONG\r\n"])

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(next(answers))

    async with server(answer, timeout_s=0.2) as endpoint:
        channel = SharedChannel(endpoint)
        began = time.monotonic()
        with pytest.raises(ChannelError, match="no answer within"):
            await channel.call("PING")
        assert 0.15 < time.monotonic() - began < 2.0
        assert await channel.call("PING") == b"PONG"
        channel.close()


async def test_answers_outside_the_protocol_end_the_connection() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\r\n")

    async with server(answer) as endpoint:
        channel = SharedChannel(endpoint)
        with pytest.raises(ChannelError, match="outside the protocol"):
            await channel.call("PING")
        channel.close()


async def test_nobody_there() -> None:
    async with server(lambda _: asyncio.sleep(0)) as endpoint:
        pass
    with pytest.raises(ChannelError):
        await SharedChannel(endpoint).call("PING")
