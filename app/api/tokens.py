"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, json_response
from app.api.body import parse, read_body
from app.api.openapi import json_body
from app.api.schemas import CacheSalt, Message, TokenId
from app.errors import InvalidRequestError
from app.requests.conversation import prompt_tokens
from app.requests.served import ServedModel


class TokenizeRequest(msgspec.Struct, frozen=True):
    """Body of `POST /tokenize`: a text, or a conversation that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None
    cache_salt: CacheSalt | None = None
    """Checked like a request's, for clients that send the same body to both; tokens are the same with any."""


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """Body of `POST /detokenize`."""

    tokens: list[TokenId]
    model: str | None = None


class Tokenized(msgspec.Struct, frozen=True):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """Answer of `POST /detokenize`."""

    prompt: str


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


def tokens_router(desk: Desk) -> APIRouter:
    """The routes over `desk`."""
    router = APIRouter()

    def _model(name: str | None) -> ServedModel:
        return desk.model(next(iter(desk.models)) if name is None else name)

    @router.post("/tokenize", openapi_extra=json_body(TokenizeRequest, Tokenized))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        body = parse(await read_body(request, desk.settings.max_body_bytes), _tokenize_decoder)
        model = _model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("prompt: give either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = await prompt_tokens(model, body.messages)
        else:
            tokens = await model.tokenise(body.prompt or "", "prompt")
        strings: Any = None
        if body.return_token_strs:
            tokenizer = model.text.tokenizer
            strings = [tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in tokens]
        return json_response(Tokenized(len(tokens), model.max_context_tokens, tokens, strings))

    @router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest, Detokenized))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, control tokens included."""
        body = parse(await read_body(request, desk.settings.max_body_bytes), _detokenize_decoder)
        model = _model(body.model)
        if body.tokens:
            model.check_tokens(body.tokens, "tokens")
        data = b"".join(map(model.text.tokenizer.token_bytes, body.tokens))
        return json_response(Detokenized(data.decode("utf-8", errors="replace")))

    return router
