"""`python -m app.bench.echo_upstream PORT`: an OpenAI-shaped server that costs next to nothing, for proxies to stand
before.

It answers every chat completion with `max_tokens` times the same word, streamed or whole, as fast as it is read.
"""

import asyncio
import json
import sys

from engine.lifeline import exit_with_parent

_HEAD = b'data: {"id":"chatcmpl-echo","object":"chat.completion.chunk","created":1,"model":"echo",'
_HEAD += b'"choices":[{"index":0,'
_CHUNK = _HEAD + b'"delta":{"content":" word"},"finish_reason":null}]}\n\n'
_FIRST = _HEAD + b'"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
_LAST = _HEAD + b'"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, kept alive between requests unless the client wants it closed."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
            body = json.loads(await reader.readexactly(int(lines.get(b"content-length", b"0"))) or b"{}")
            if body.get("stream"):
                await _stream(writer, int(body.get("max_tokens", 16)))
            else:
                _whole(writer, int(body.get("max_tokens", 16)))
            await writer.drain()
            if lines.get(b"connection", b"").strip() == b"close":
                break
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _stream(writer: asyncio.StreamWriter, num_tokens: int) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + _framed(_FIRST)
    )
    frame = _framed(_CHUNK)
    for _ in range(num_tokens):
        writer.write(frame)
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(_framed(_LAST) + b"0\r\n\r\n")


def _whole(writer: asyncio.StreamWriter, num_tokens: int) -> None:
    answer = {
        "id": "chatcmpl-echo",
        "object": "chat.completion",
        "created": 1,
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " word" * num_tokens},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 8, "completion_tokens": num_tokens, "total_tokens": 8 + num_tokens},
    }
    body = json.dumps(answer).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def main(port: int) -> None:
    """Serve on 127.0.0.1 until the parent goes."""
    async with await asyncio.start_server(serve, "127.0.0.1", port, backlog=2048) as server:
        await server.serve_forever()


if __name__ == "__main__":
    exit_with_parent()
    asyncio.run(main(int(sys.argv[1])))
