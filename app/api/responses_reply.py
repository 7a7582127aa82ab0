"""The object that answers `POST /v1/responses`: what the request fixed of it, filled in as the answer comes."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from app.api.answers import WholeAnswer
from app.api.responses_schemas import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseFailure,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    Status,
)
from app.api.schemas import ChosenLogprob, Usage
from app.errors import GatewayError
from app.requests.calls import CallDelta
from app.requests.record import RequestRecord
from app.requests.served import ServedModel


class Reply:
    """Makes the object of one request in each of its states."""

    def __init__(self, body: ResponsesRequest, record: RequestRecord, model: ServedModel) -> None:
        mark = record.request_id.removeprefix("req_")
        self.message_id = f"msg_{mark}"
        self._begun = ResponseObject(
            id=f"resp_{mark}",
            created_at=record.created,
            model=model.id,
            status="in_progress",
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=body.reasoning or {"effort": None, "summary": None},
            temperature=1.0 if body.temperature is None else body.temperature,
            text=_text_options(body),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
        )

    def begun(self) -> ResponseObject:
        """Before anything of the answer is there."""
        return self._begun

    def message(self, text: str, logprobs: Sequence[ChosenLogprob], status: Status) -> OutputMessage:
        """The turn's text."""
        return OutputMessage(self.message_id, status, [OutputText(text, [], list(logprobs))])

    def call(self, call: CallDelta, status: Status) -> OutputCall:
        """A call, as far as it came."""
        call_id = call.call_id or ""
        return OutputCall(
            "fc_" + call_id.removeprefix("call_"), call_id, call.name or "", call.arguments, status
        )

    def ended(self, output: list[OutputItem], finish_reason: str, usage: Usage) -> ResponseObject:
        """After the answer's end: completed, or cut where its tokens were used up."""
        cut = finish_reason == "length"
        return msgspec.structs.replace(
            self._begun,
            status="incomplete" if cut else "completed",
            incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
            completed_at=None if cut else int(time.time()),
            output=output,
            usage=_usage(usage),
        )

    def failed(self, output: list[OutputItem], error: GatewayError) -> ResponseObject:
        """After a failure that came when the answer had begun."""
        code = "server_error" if error.status >= 500 else error.body.code or "server_error"
        return msgspec.structs.replace(
            self._begun, status="failed", error=ResponseFailure(code, error.message), output=output
        )

    def whole(self, answer: WholeAnswer, usage: Usage) -> ResponseObject:
        """The answer in one piece: its text, if any, and then its calls."""
        last: Status = "incomplete" if answer.finish_reason == "length" else "completed"
        output: list[OutputItem] = [self.call(call, "completed") for call in answer.calls]
        if answer.text or not output:
            logprobs = answer.logprobs or []
            logprobs = spoken(answer.text, logprobs) if answer.calls else logprobs
            output.insert(0, self.message(answer.text, logprobs, "completed"))
        output[-1] = msgspec.structs.replace(output[-1], status=last)
        return self.ended(output, answer.finish_reason, usage)


def spoken(text: str, logprobs: Sequence[ChosenLogprob]) -> list[ChosenLogprob]:
    """Those of the tokens that `text` is made of, without the tokens of calls after it."""
    num_bytes, kept = len(text.encode()), []
    for entry in logprobs:
        if num_bytes <= 0:
            break
        kept.append(entry)
        num_bytes -= len(entry.bytes)
    return kept


def _usage(usage: Usage) -> ResponsesUsage:
    details = usage.prompt_tokens_details
    return ResponsesUsage(
        usage.prompt_tokens,
        InputTokensDetails(0, 0)
        if details is None
        else InputTokensDetails(details.cached_tokens, details.cache_write_tokens),
        usage.completion_tokens,
        OutputTokensDetails(),
        usage.total_tokens,
    )


def _text_options(body: ResponsesRequest) -> dict[str, Any]:
    wanted = body.text.format if body.text is not None else None
    described = {"type": "text"} if wanted is None else msgspec.to_builtins(wanted)
    verbosity = body.text.verbosity if body.text is not None else None
    return {
        "format": {name: value for name, value in described.items() if value is not None},
        "verbosity": verbosity or "medium",
    }
