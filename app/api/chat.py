"""`POST /v1/chat/completions`."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, WholeAnswer, deadline_at, new_record, stream_answer, whole_answer
from app.api.body import parse, read_body
from app.api.openapi import json_body
from app.api.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChosenLogprob,
    ContentPart,
    Message,
    Usage,
)
from app.errors import InvalidRequestError, UnsupportedError
from app.requests.choice import Piece
from app.requests.constraint import constraint
from app.requests.generation import Generation, Order
from app.requests.record import RequestRecord
from app.requests.sampling import sampling_params, stop_strings
from app.requests.served import ServedModel
from app.text import ChatTemplateError

_LETTERS = str.maketrans("0123456789", "ghijklmnop")
"""A mark of letters only, so that the number between two marks ends where the second begins."""

_decoder = msgspec.json.Decoder(ChatRequest)
_json = msgspec.json.Encoder().encode


class ChatChunks:
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
            if piece.text or piece.logprobs:
                logprobs = _json(ChatLogprobs(piece.logprobs)) if piece.logprobs is not None else b"null"
                events.append(
                    start
                    + b'{"content":%s},"logprobs":%s,"finish_reason":null' % (_json(piece.text), logprobs)
                    + self._tail
                )
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

    @router.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, streamed or whole."""
        record = new_record(request, "chat")
        body = parse(await read_body(request, desk.settings.max_body_bytes), _decoder)
        _refuse_unsupported(body)
        desk.check(body)
        model = desk.model(body.model)
        record.stream = bool(body.stream)
        prompt = await prompt_tokens(model, body.messages)
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        sampling = sampling_params(
            body,
            model,
            max_tokens=model.max_tokens(len(prompt), wanted, None, "messages"),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await constraint(body, body.response_format),
        )
        record.add_phase("prepare", record.arrived_at, time.monotonic())
        order = Order(
            prompts=[prompt],
            sampling=[sampling],
            n=body.n or 1,
            stops=stop_strings(body.stop),
            continues_text=False,
            deadline_at=deadline_at(request, record, record.stream),
            cache_salt=body.cache_salt or "",
            names_max_tokens=wanted is not None,
        )
        generation = await desk.generator.begin(order, model, record)
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
        ChatChoice(index, AnswerMessage(answer.text), answer.finish_reason, _logprobs(answer.logprobs))
        for index, answer in enumerate(answers)
    ]
    record, model = generation.record, generation.model
    return ChatCompletion(
        completion_id(record), record.created, model.id, choices, usage, model.system_fingerprint
    )


async def prompt_tokens(model: ServedModel, messages: Sequence[Message]) -> list[int]:
    """The prompt of a conversation. A control token's name inside a message is text, and steers nothing.

    Raises InvalidRequestError naming the message at fault.
    """
    if not messages:
        raise InvalidRequestError("messages: must hold at least one message", param="messages")
    template = model.text.chat_template
    if template is None:
        raise UnsupportedError(
            f"{model.id} has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    turns = [_turn(place, message) for place, message in enumerate(messages)]
    mark = secrets.token_hex(8).translate(_LETTERS)
    quoted = [{**turn, "content": model.text.tokenizer.quote(turn["content"], mark)} for turn in turns]
    try:
        if sum(len(turn["content"]) for turn in quoted) < 65536:
            text = template.render(quoted)
        else:
            text = await asyncio.to_thread(template.render, quoted)
    except ChatTemplateError as error:
        raise InvalidRequestError(str(error), param="messages") from None
    return await model.tokenise(text, "messages", None if quoted == turns else mark)


def _turn(place: int, message: Message) -> dict[str, Any]:
    if message.tool_calls:
        raise UnsupportedError(
            "tool calls are not supported by this service", param=f"messages[{place}].tool_calls"
        )
    if message.content is None:
        raise InvalidRequestError(
            f"messages[{place}].content: expected a string or text parts, got null",
            param=f"messages[{place}].content",
        )
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = [_part_text(f"messages[{place}].content[{i}]", part) for i, part in enumerate(message.content)]
    return {"role": role, "content": "".join(texts)}


def _part_text(path: str, part: ContentPart) -> str:
    if part.type != "text":
        raise UnsupportedError(
            f"{path}: parts of type {part.type!r} are not supported, only text", param=f"{path}.type"
        )
    if part.text is None:
        raise InvalidRequestError(f"{path}.text is required", param=f"{path}.text")
    return part.text


def _refuse_unsupported(body: ChatRequest) -> None:
    if body.modalities is not None and body.modalities != ["text"]:
        raise UnsupportedError("modalities: only text is supported", param="modalities")
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none", "auto"):
            raise UnsupportedError(f"{name} is not supported by this service", param=name)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")


def _logprobs(content: list[ChosenLogprob] | None) -> ChatLogprobs | None:
    return None if content is None else ChatLogprobs(content)
