"""`POST /v1/completions`: text or token ids in, their continuation out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, WholeAnswer, deadline_at, new_record, stream_answer, whole_answer
from app.api.body import parse, read_body
from app.api.echo import (
    CompletionOffsets,
    Echo,
    completion_logprobs,
    echoed_logprobs,
    joined,
    prompt_logprobs,
)
from app.api.openapi import json_body
from app.api.schemas import Completion, CompletionLogprobs, CompletionRequest, TextChoice, Usage
from app.api.sse import ChunkFormat
from app.errors import InvalidRequestError, UnsupportedError
from app.requests.choice import Piece
from app.requests.constraint import constraint
from app.requests.generation import Generation, Order
from app.requests.record import RequestRecord
from app.requests.sampling import sampling_params, stop_strings
from app.requests.served import ServedModel, fewest_tokens

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""

_decoder = msgspec.json.Decoder(CompletionRequest)
_json = msgspec.json.Encoder().encode


class CompletionChunks(ChunkFormat):
    """Chunks of a completion. `repeat` is what comes before a choice's answer, from its first piece on."""

    def __init__(
        self,
        record: RequestRecord,
        model: ServedModel,
        include_usage: bool,
        repeat: "Repeat | None" = None,
    ) -> None:
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
        self._repeat = repeat
        self._offsets: dict[int, CompletionOffsets] = {}

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """One event for each piece."""
        return b"".join(map(self._piece, pieces))

    def usage(self, usage: Usage) -> bytes:
        """The last chunk, with the totals."""
        return self._head + b'"choices":[],"usage":%s}\n\n' % _json(usage)

    def _piece(self, piece: Piece) -> bytes:
        text, described = piece.text, None
        if piece.choice not in self._offsets:
            self._offsets[piece.choice] = CompletionOffsets()
            if self._repeat is not None:
                prompt, described = self._repeat(piece.choice, self._offsets[piece.choice])
                text = prompt + text
        if piece.logprobs is not None:
            described = joined(described, completion_logprobs(piece.logprobs, self._offsets[piece.choice]))
        return (
            self._head
            + b'"choices":[{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s'
            % (piece.choice, _json(text), _json(described), _json(piece.finish_reason))
            + self._tail
        )


def completion_id(record: RequestRecord) -> str:
    """The answer's id, made from the request's."""
    return "cmpl-" + record.request_id.removeprefix("req_")


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
        _check_prompt_logprobs(body)
        model = desk.model(body.model)
        record.stream = bool(body.stream)
        gives_up_at = deadline_at(request, record, record.stream)
        desk.generator.check(
            record,
            model,
            prompt_tokens=sum(sizes := fewest_prompt_tokens(body.prompt)),
            num_sequences=len(sizes) * (body.n or 1),
            priority=body.priority or 0,
            deadline_at=gives_up_at,
        )
        prompts = await tokenise_prompts(model, body.prompt, desk.settings.max_prompts)
        grammar = await constraint(body, body.response_format)
        scored = [body.prompt_logprobs, body.logprobs if body.echo else None]
        sampling = [
            sampling_params(
                body,
                model,
                # A worker makes one token at least.
                max_tokens=model.max_tokens(len(prompt), body.max_tokens, DEFAULT_MAX_TOKENS, "prompt") or 1,
                logprobs=body.logprobs,
                grammar=grammar,
                prompt_logprobs=max((k for k in scored if k is not None), default=None),
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
            deadline_at=gives_up_at,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            drops_answers=body.max_tokens == 0,
        )
        generation = await desk.generator.begin(order, model, record)
        repeat = Repeat(generation, echoes(body, prompts, model)) if body.echo else None
        if record.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await stream_answer(
                desk,
                request,
                generation,
                CompletionChunks(record, model, include_usage, repeat),
                include_usage,
            )
        return await whole_answer(
            request, generation, partial(assemble, generation, repeat, body.prompt_logprobs)
        )

    return router


@dataclass(frozen=True)
class Repeat:
    """The prompts of a generation as its answers repeat them."""

    generation: Generation
    echoes: Sequence[Echo]
    """One per prompt."""

    def __call__(self, choice: int, offsets: CompletionOffsets) -> tuple[str, CompletionLogprobs | None]:
        """What comes before a choice's answer, which has begun; `offsets` goes on behind it."""
        echo = self.echoes[choice // self.generation.order.n]
        if echo.num_top is None:
            return echo.text, None
        scores = self.generation.choices[choice].dispatch.work.prompt_scores
        return echo.text, echoed_logprobs(echo, scores, self.generation.model.text.tokenizer, offsets)


def echoes(body: CompletionRequest, prompts: list[list[int]], model: ServedModel) -> list[Echo]:
    """The prompts to be repeated: texts as they were given, token ids as what they spell."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    spell = model.text.tokenizer.token_bytes
    texts = [text for text in given if isinstance(text, str)] or [
        b"".join(map(spell, prompt)).decode("utf-8", errors="replace") for prompt in prompts
    ]
    return [Echo(text, prompt, body.logprobs) for text, prompt in zip(texts, prompts, strict=True)]


def assemble(
    generation: Generation,
    repeat: Repeat | None,
    num_prompt_logprobs: int | None,
    answers: list[WholeAnswer],
    usage: Usage,
) -> Completion:
    """The answer in one piece."""
    record, model = generation.record, generation.model
    choices = []
    for index, answer in enumerate(answers):
        offsets = CompletionOffsets()
        prompt, logprobs = ("", None) if repeat is None else repeat(index, offsets)
        if answer.logprobs is not None:
            logprobs = joined(logprobs, completion_logprobs(answer.logprobs, offsets))
        choice = TextChoice(index, prompt + answer.text, answer.finish_reason, logprobs)
        if num_prompt_logprobs is not None:
            work = generation.choices[index].dispatch.work
            described = prompt_logprobs(
                work.prompt_tokens, work.prompt_scores, num_prompt_logprobs, model.text.tokenizer
            )
            choice = msgspec.structs.replace(choice, prompt_logprobs=described)
        choices.append(choice)
    return Completion(
        completion_id(record), record.created, model.id, choices, usage, model.system_fingerprint
    )


def fewest_prompt_tokens(prompt: str | list[str | int | list[int]]) -> list[int]:
    """What each of the prompts has at least; token ids by themselves are one prompt."""
    if isinstance(prompt, str):
        return [fewest_tokens(prompt)]
    if not prompt or isinstance(prompt[0], int):
        return [max(1, len(prompt))]
    return [
        fewest_tokens(item) if isinstance(item, str) else 1 if isinstance(item, int) else len(item)
        for item in prompt
    ]


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


def _check_prompt_logprobs(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError(
            "max_tokens: 0 is for prompts alone, with echo; else at least 1", param="max_tokens"
        )
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError(
            "prompt_logprobs: not for streams; ask without stream, or for echo and logprobs",
            param="prompt_logprobs",
        )
