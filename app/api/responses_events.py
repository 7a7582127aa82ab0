"""A response as the events of OpenAI's Responses API, in their order and numbered.

created, in_progress, then for each item of the output: added, its content as it comes, done; at last completed,
incomplete, or (after an `error` event) failed. There is no `[DONE]`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from app.api.responses_reply import Reply, spoken
from app.api.responses_schemas import OutputItem, OutputText, Status
from app.api.schemas import ChosenLogprob, Usage
from app.api.sse import ChunkFormat
from app.errors import GatewayError
from app.requests.calls import CallDelta
from app.requests.choice import Piece

_json = msgspec.json.Encoder().encode


class ResponseEvents(ChunkFormat):
    """Writes the events of one response."""

    done = b""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._number = 0
        self._output: list[OutputItem] = []
        """Items that are done."""
        self._text: str | None = None
        """Of the message that is under way."""
        self._logprobs: list[ChosenLogprob] = []
        self._call: CallDelta | None = None
        """The call that is under way."""
        self._finish_reason = ""

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The events of some pieces of the one choice."""
        events = self._opening()
        for piece in pieces:
            if piece.text or (piece.logprobs and self._text is not None):
                events += self._say(piece.text, piece.logprobs or [])
            for delta in piece.calls:
                events += self._take(delta)
            if piece.finish_reason is not None:
                self._finish_reason = piece.finish_reason
                if self._text is None and self._call is None:
                    events += self._say("", [])
                events += self._close("incomplete" if piece.finish_reason == "length" else "completed")
        return b"".join(events)

    def usage(self, usage: Usage) -> bytes:
        """The last event, with the whole response and its totals."""
        response = self._reply.ended(self._output, self._finish_reason, usage)
        return self._event(f"response.{response.status}", response=response)

    def failure(self, error: GatewayError) -> bytes:
        """What went wrong, and the response as far as it came."""
        told = error.body
        return b"".join(
            [
                *self._opening(),
                *self._close("incomplete"),
                self._event("error", code=told.code or told.type, message=told.message, param=told.param),
                self._event("response.failed", response=self._reply.failed(self._output, error)),
            ]
        )

    def _opening(self) -> list[bytes]:
        if self._number:
            return []
        response = self._reply.begun()
        return [self._event(f"response.{state}", response=response) for state in ("created", "in_progress")]

    def _say(self, text: str, logprobs: list[ChosenLogprob]) -> list[bytes]:
        events: list[bytes] = []
        if self._text is None:
            self._text = ""
            item = msgspec.structs.replace(self._reply.message("", [], "in_progress"), content=[])
            events += [
                self._event("response.output_item.added", output_index=len(self._output), item=item),
                self._text_event("content_part.added", part=OutputText("")),
            ]
        self._text += text
        self._logprobs += logprobs
        if text or logprobs:
            events.append(self._text_event("output_text.delta", delta=text, logprobs=logprobs))
        return events

    def _take(self, delta: CallDelta) -> list[bytes]:
        events: list[bytes] = []
        if delta.name is not None:
            self._logprobs = spoken(self._text or "", self._logprobs)
            events += self._close("completed")
            self._call = replace(delta, arguments="")
            item = self._reply.call(self._call, "in_progress")
            events.append(
                self._event("response.output_item.added", output_index=len(self._output), item=item)
            )
        assert self._call is not None
        self._call = self._call.followed_by(delta)
        if delta.arguments:
            events.append(self._call_event("delta", delta=delta.arguments))
        return events

    def _close(self, status: Status) -> list[bytes]:
        """End the item that is under way, if one is."""
        item: OutputItem
        if self._text is not None:
            item = self._reply.message(self._text, self._logprobs, status)
            (part,) = item.content
            events = [
                self._text_event("output_text.done", text=part.text, logprobs=part.logprobs),
                self._text_event("content_part.done", part=part),
            ]
            self._text = None
        elif self._call is not None:
            item = self._reply.call(self._call, status)
            events = [self._call_event("done", name=item.name, arguments=item.arguments)]
            self._call = None
        else:
            return []
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=item))
        self._output.append(item)
        return events

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(
            f"response.{kind}",
            item_id=self._reply.message_id,
            output_index=len(self._output),
            content_index=0,
            **fields,
        )

    def _call_event(self, kind: str, **fields: Any) -> bytes:
        assert self._call is not None
        item_id = self._reply.call(self._call, "in_progress").id
        place = len(self._output)
        return self._event(
            f"response.function_call_arguments.{kind}", item_id=item_id, output_index=place, **fields
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _json({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
