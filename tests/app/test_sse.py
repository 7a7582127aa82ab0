"""Events are framed so that the SDK's own decoder gives back what went in, however the bytes are cut."""

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from app.api.chat import ChatChunks
from app.api.completions import CompletionChunks
from app.api.schemas import PromptTokensDetails, Usage
from app.api.sse import DONE, KEEP_ALIVE, error_event
from app.errors import UnavailableError
from app.requests.choice import Piece
from app.requests.record import RequestRecord
from app.requests.served import ServedModel

USAGE = Usage(3, 4, 7, PromptTokensDetails(2, 3))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
pieces_of_two = st.lists(st.builds(Piece, st.integers(0, 1), texts, st.none(), st.none()), max_size=12)


def decode(data: bytes, cuts: list[int]) -> list[str]:
    """The `data` of every event, by the decoder inside the openai package, fed in arbitrary cuts."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    parts = [data[start:end] for start, end in pairwise(edges)]
    return [event.data for event in SSEDecoder().iter_bytes(iter(parts))]


@given(pieces_of_two, st.lists(st.integers(0, 10**6), max_size=8), st.booleans())
def test_chat_chunks_survive_the_sdk_decoder(
    served: ServedModel, pieces: list[Piece], cuts: list[int], include_usage: bool
) -> None:
    record = RequestRecord("req_1", "chat", 5, 0.0)
    chunks = ChatChunks(record, served, include_usage)
    data = KEEP_ALIVE
    for piece in pieces:
        data += chunks.pieces([piece]) + KEEP_ALIVE
    data += chunks.pieces([Piece(0, "", None, "stop"), Piece(1, "end", None, "length")])
    data += (chunks.usage(USAGE) if include_usage else b"") + DONE
    assert b"\nid:" not in data
    assert data.endswith(b"\n\n")
    *events, done = decode(data, cuts)
    assert done == "[DONE]"
    parsed: list[dict[str, Any]] = [json.loads(event) for event in events]
    assert {event["object"] for event in parsed} == {"chat.completion.chunk"}
    assert {(event["id"], event["created"], event["model"]) for event in parsed} == {
        ("chatcmpl-1", 5, served.id)
    }
    for choice in (0, 1):
        deltas = [e["choices"][0] for e in parsed if e["choices"] and e["choices"][0]["index"] == choice]
        assert deltas[0]["delta"]["role"] == "assistant"
        assert all("role" not in delta["delta"] for delta in deltas[1:])
        text = "".join(delta["delta"].get("content", "") for delta in deltas)
        assert text == "".join(p.text for p in pieces if p.choice == choice) + ("end" if choice else "")
        assert [delta["finish_reason"] for delta in deltas][-1] == ("length" if choice else "stop")
        assert all(delta["finish_reason"] is None for delta in deltas[:-1])
    if include_usage:
        assert parsed[-1]["choices"] == []
        assert parsed[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2, "cache_write_tokens": 3}
        assert all(event["usage"] is None for event in parsed[:-1])
    else:
        assert all("usage" not in event for event in parsed)


@given(pieces_of_two, st.lists(st.integers(0, 10**6), max_size=8))
def test_completion_chunks_survive_the_sdk_decoder(
    served: ServedModel, pieces: list[Piece], cuts: list[int]
) -> None:
    chunks = CompletionChunks(RequestRecord("req_1", "completions", 5, 0.0), served, False)
    *events, done = decode(chunks.pieces(pieces) + DONE, cuts)
    assert done == "[DONE]"
    assert [json.loads(event)["choices"][0]["text"] for event in events] == [piece.text for piece in pieces]


def test_an_error_event_is_the_envelope() -> None:
    (data,) = decode(error_event(UnavailableError("gone")), [])
    assert json.loads(data)["error"]["code"] == "service_unavailable"
