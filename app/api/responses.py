"""`POST /v1/responses`: a conversation in OpenAI's newer shape; nothing of it is kept here for a next request."""

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.answers import Desk, new_record, stream_answer, whole_answer
from app.api.body import parse, read_body
from app.api.dialogue import Dialogue, begin
from app.api.openapi import json_body
from app.api.responses_events import ResponseEvents
from app.api.responses_reply import Reply
from app.api.responses_schemas import ResponseObject, ResponsesRequest
from app.errors import UnsupportedError
from app.requests.responses import response_format_of, talk_of, tool_choice_of, tools_of

LOGPROBS = "message.output_text.logprobs"
"""What `include` says to have log-probabilities."""

_decoder = msgspec.json.Decoder(ResponsesRequest)


def responses_router(desk: Desk) -> APIRouter:
    """The route over `desk`."""
    router = APIRouter()

    @router.post("/v1/responses", openapi_extra=json_body(ResponsesRequest, ResponseObject, is_streamed=True))
    async def create_response(request: Request) -> Response:
        """Answer the input, streamed or whole."""
        record = new_record(request, "responses")
        body = parse(await read_body(request, desk.settings.max_body_bytes), _decoder)
        if body.truncation == "auto":
            raise UnsupportedError(
                "truncation: only disabled is supported; an input that does not fit is refused",
                param="truncation",
            )
        desk.check(body)
        model = desk.model(body.model)
        talk = talk_of(body)
        wants_logprobs = LOGPROBS in (body.include or ()) or body.top_logprobs
        dialogue = Dialogue(
            messages=talk.messages,
            tools=tools_of(body.tools or ()),
            tool_choice=tool_choice_of(body.tool_choice),
            parallel_tool_calls=body.parallel_tool_calls,
            response_format=response_format_of(body.text.format if body.text is not None else None),
            max_tokens=body.max_output_tokens,
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        )
        with talk.named():
            generation = await begin(desk, request, record, model, body, dialogue)
        reply = Reply(body, record, model)
        if record.stream:
            return await stream_answer(desk, request, generation, ResponseEvents(reply), include_usage=True)
        return await whole_answer(request, generation, lambda answers, usage: reply.whole(answers[0], usage))

    return router
