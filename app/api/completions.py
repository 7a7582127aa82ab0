"""`POST /v1/completions`: text or token ids in, their continuation out."""

import time
from collections.abc import Sequence
from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, WholeAnswer, deadline_at, new_record, stream_answer, whole_answer
from app.api.body import parse, read_body
from app.api.openapi import json_body
from app.api.schemas import (
    ChosenLogprob,
    Completion,
    CompletionLogprobs,
    CompletionRequest,
    TextChoice,
    Usage,
)
from app.api.sse import ChunkFormat
from app.errors import InvalidRequestError, UnsupportedError
from app.requests.choice import Piece
from app.requests.constraint import constraint
from app.requests.generation import Generation, Order
from app.requests.record import RequestRecord
from app.requests.sampling import sampling_params, stop_strings
from app.requests.served import ServedModel

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""

_decoder = msgspec.json.Decoder(CompletionRequest)
_json = msgspec.json.Encoder().encode


class CompletionChunks(ChunkFormat):
    """Chunks of a completion."""

    def __init__(self, record: RequestRecord, model: ServedModel, include_usage: bool) -> None:
        self._head = (
            b'data: {"id":%s,"object":"text_completion","created":%d,"model":%s,"system_fingerprint":%s,'
            % (
                _json(completion_id(record)),
                record.created,
                _json(model.id),
                _json(model.system_fingerprint),
            )
        )
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._num_characters: dict[int, int] = {}

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """One event for each piece."""
        return b"".join(map(self._piece, pieces))

    def usage(self, usage: Usage) -> bytes:
        """The last chunk, with the totals."""
        return self._head + b'"choices":[],"usage":%s}\n\n' % _json(usage)

    def _piece(self, piece: Piece) -> bytes:
        logprobs = b"null"
        if piece.logprobs is not None:
            offset = self._num_characters.get(piece.choice, 0)
            described = completion_logprobs(piece.logprobs, offset)
            self._num_characters[piece.choice] = offset + sum(map(len, described.tokens))
            logprobs = _json(described)
        return (
            self._head
            + b'"choices":[{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s'
            % (piece.choice, _json(piece.text), logprobs, _json(piece.finish_reason))
            + self._tail
        )


def completion_id(record: RequestRecord) -> str:
    """The answer's id, made from the request's."""
    return "cmpl-" + record.request_id.removeprefix("req_")


def completion_logprobs(content: Sequence[ChosenLogprob], offset: int = 0) -> CompletionLogprobs:
    """The older shape of log-probabilities; text offsets begin at `offset` characters."""
    offsets = []
    for entry in content:
        offsets.append(offset)
        offset += len(entry.token)
    return CompletionLogprobs(
        [entry.token for entry in content],
        [entry.logprob for entry in content],
        [{top.token: top.logprob for top in entry.top_logprobs} for entry in content],
        offsets,
    )


def completions_router(desk: Desk) -> APIRouter:
    """The route over `desk`."""
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=json_body(CompletionRequest, Completion, is_streamed=True))
    async def create_completion(request: Request) -> Response:
        """Continue one or several prompts, streamed or whole."""
        record = new_record(request, "completions")
        body = parse(await read_body(request, desk.settings.max_body_bytes), _decoder)
        desk.check(body)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise UnsupportedError("best_of other than n is not supported", param="best_of")
        model = desk.model(body.model)
        record.stream = bool(body.stream)
        prompts = await tokenise_prompts(model, body.prompt, desk.settings.max_prompts)
        grammar = await constraint(body, body.response_format)
        sampling = [
            sampling_params(
                body,
                model,
                max_tokens=model.max_tokens(len(prompt), body.max_tokens, DEFAULT_MAX_TOKENS, "prompt"),
                logprobs=body.logprobs,
                grammar=grammar,
            )
            for prompt in prompts
        ]
        record.add_phase("prepare", record.arrived_at, time.monotonic())
        order = Order(
            prompts=prompts,
            sampling=sampling,
            n=body.n or 1,
            stops=stop_strings(body.stop),
            continues_text=True,
            deadline_at=deadline_at(request, record, record.stream),
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
        )
        generation = await desk.generator.begin(order, model, record)
        if record.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await stream_answer(
                desk, request, generation, CompletionChunks(record, model, include_usage), include_usage
            )
        return await whole_answer(request, generation, partial(assemble, generation))

    return router


def assemble(generation: Generation, answers: list[WholeAnswer], usage: Usage) -> Completion:
    """The answer in one piece."""
    record, model = generation.record, generation.model
    choices = [_choice(index, answer) for index, answer in enumerate(answers)]
    return Completion(
        completion_id(record), record.created, model.id, choices, usage, model.system_fingerprint
    )


async def tokenise_prompts(
    model: ServedModel, prompt: str | list[str | int | list[int]], max_prompts: int
) -> list[list[int]]:
    """The prompts as token ids. Raises InvalidRequestError for mixtures, too many prompts and empty ones."""
    texts_or_ids: list[str | list[int]]
    if isinstance(prompt, str):
        texts_or_ids = [prompt]
    elif all(isinstance(item, int) for item in prompt):
        texts_or_ids = [[item for item in prompt if isinstance(item, int)]]
    elif any(isinstance(item, int) for item in prompt):
        raise InvalidRequestError("prompt: token ids and texts cannot be mixed in one list", param="prompt")
    else:
        texts_or_ids = [item for item in prompt if not isinstance(item, int)]
    if len(texts_or_ids) > max_prompts:
        raise InvalidRequestError(
            f"prompt: at most {max_prompts} prompts in one call, got {len(texts_or_ids)}", param="prompt"
        )
    prompts = []
    for item in texts_or_ids:
        tokens = await model.tokenise(item, "prompt") if isinstance(item, str) else item
        if not tokens:
            raise InvalidRequestError("prompt: must hold at least one token", param="prompt")
        model.check_tokens(tokens, "prompt")
        prompts.append(tokens)
    return prompts


def _choice(index: int, answer: WholeAnswer) -> TextChoice:
    logprobs = None if answer.logprobs is None else completion_logprobs(answer.logprobs)
    return TextChoice(index, answer.text, answer.finish_reason, logprobs)
