"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, WholeAnswer, new_record, stream_answer, whole_answer
from app.api.body import parse, read_body
from app.api.dialogue import Dialogue, begin
from app.api.openapi import json_body
from app.api.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChosenLogprob,
    FunctionCall,
    ToolCall,
    Usage,
)
from app.api.sse import ChunkFormat
from app.errors import InvalidRequestError, UnsupportedError
from app.requests.calls import CallDelta
from app.requests.choice import Piece
from app.requests.generation import Generation
from app.requests.record import RequestRecord
from app.requests.served import ServedModel

_decoder = msgspec.json.Decoder(ChatRequest)
_json = msgspec.json.Encoder().encode


class ChatChunks(ChunkFormat):
    """Chunks of a chat: everything that does not change from one to the next is encoded once."""

    def __init__(self, record: RequestRecord, model: ServedModel, include_usage: bool) -> None:
        self._head = (
            b'data: {"id":%s,"object":"chat.completion.chunk","created":%d,"model":%s,"system_fingerprint":%s,'
            % (
                _json(completion_id(record)),
                record.created,
                _json(model.id),
                _json(model.system_fingerprint),
            )
        )
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._begun: set[int] = set()

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The events of some pieces; a choice's first is preceded by its role, its reason to end comes alone."""
        events: list[bytes] = []
        for piece in pieces:
            start = self._head + b'"choices":[{"index":%d,"delta":' % piece.choice
            if piece.choice not in self._begun:
                self._begun.add(piece.choice)
                events.append(
                    start
                    + b'{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'
                    + self._tail
                )
            logprobs = b"null" if piece.logprobs is None else _json(ChatLogprobs(piece.logprobs))
            if piece.text or piece.logprobs:
                events.append(
                    start
                    + b'{"content":%s},"logprobs":%s,"finish_reason":null' % (_json(piece.text), logprobs)
                    + self._tail
                )
            events += [
                start
                + b'{"tool_calls":[%s]},"logprobs":null,"finish_reason":null' % _call(delta)
                + self._tail
                for delta in piece.calls
            ]
            if piece.finish_reason is not None:
                events.append(
                    start + b'{},"logprobs":null,"finish_reason":%s' % _json(piece.finish_reason) + self._tail
                )
        return b"".join(events)

    def usage(self, usage: Usage) -> bytes:
        """The last chunk, with the totals."""
        return self._head + b'"choices":[],"usage":%s}\n\n' % _json(usage)


def completion_id(record: RequestRecord) -> str:
    """The answer's id, made from the request's."""
    return "chatcmpl-" + record.request_id.removeprefix("req_")


def chat_router(desk: Desk) -> APIRouter:
    """The route over `desk`."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions", openapi_extra=json_body(ChatRequest, ChatCompletion, is_streamed=True)
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, streamed or whole."""
        record = new_record(request, "chat")
        body = parse(await read_body(request, desk.settings.max_body_bytes), _decoder)
        _refuse_unsupported(body)
        desk.check(body)
        model = desk.model(body.model)
        dialogue = Dialogue(
            messages=body.messages,
            tools=body.tools or (),
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls,
            response_format=body.response_format,
            max_tokens=body.max_completion_tokens
            if body.max_completion_tokens is not None
            else body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        generation = await begin(desk, request, record, model, body, dialogue)
        if record.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await stream_answer(
                desk, request, generation, ChatChunks(record, model, include_usage), include_usage
            )
        return await whole_answer(request, generation, partial(assemble, generation))

    return router


def assemble(generation: Generation, answers: list[WholeAnswer], usage: Usage) -> ChatCompletion:
    """The answer in one piece."""
    choices = [
        ChatChoice(index, answer_message(answer), answer.finish_reason, _logprobs(answer.logprobs))
        for index, answer in enumerate(answers)
    ]
    record, model = generation.record, generation.model
    return ChatCompletion(
        completion_id(record), record.created, model.id, choices, usage, model.system_fingerprint
    )


def answer_message(answer: WholeAnswer) -> AnswerMessage:
    """Text, calls, or both."""
    if not answer.calls:
        return AnswerMessage(answer.text)
    calls = [
        ToolCall(call.call_id or "", FunctionCall(call.name or "", call.arguments)) for call in answer.calls
    ]
    return AnswerMessage(answer.text or None, tool_calls=calls)


def _call(delta: CallDelta) -> bytes:
    arguments = _json(delta.arguments)
    if delta.name is None:
        return b'{"index":%d,"function":{"arguments":%s}}' % (delta.index, arguments)
    head = (delta.index, _json(delta.call_id), _json(delta.name), arguments)
    return b'{"index":%d,"id":%s,"type":"function","function":{"name":%s,"arguments":%s}}' % head


def _refuse_unsupported(body: ChatRequest) -> None:
    if body.modalities is not None and body.modalities != ["text"]:
        raise UnsupportedError("modalities: only text is supported", param="modalities")
    if body.function_call not in (None, "none", "auto"):
        raise UnsupportedError("function_call: use tools and tool_choice", param="function_call")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")


def _logprobs(content: list[ChosenLogprob] | None) -> ChatLogprobs | None:
    return None if content is None else ChatLogprobs(content)
