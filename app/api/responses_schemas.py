"""The bodies of OpenAI's Responses API as types: what may come in, what goes out, whole and as events.

Of `Sampling` everything that picks tokens is honoured here, too; how many and how long is said in this API's own words.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from app.api.schemas import (
    REFUSED_FIELDS,
    Anything,
    ChosenLogprob,
    Hints,
    PositiveInt,
    Refused,
    Sampling,
)


class InputPart(Struct, frozen=True):
    """A piece of a message: `input_text` or `output_text`, or a `refusal` of an earlier turn."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Struct, frozen=True):
    """A turn (`message`), a call that the model made (`function_call`), or its result (`function_call_output`)."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponsesTool(Struct, frozen=True):
    """A tool that may be called; only functions are served. `strict`: the arguments keep exactly to `parameters`."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Anything] | None = None
    strict: bool | None = None


class TextFormat(Struct, frozen=True):
    """Shape of the answer: free, any JSON object, or a schema's."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Anything] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, frozen=True):
    """How the text is to be; `verbosity` is a hint without effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Sampling, kw_only=True, frozen=True):
    """Body of `POST /v1/responses`."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    text: TextOptions | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: str | dict[str, Anything] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: dict[str, Anything] | None = None
    max_tool_calls: PositiveInt | None = None
    background: Anything = None
    conversation: Anything = None
    context_management: Anything = None
    previous_response_id: Anything = None
    prompt: Anything = None
    max_completion_tokens: Anything = None
    messages: Anything = None
    response_format: Anything = None


_STATEFUL = ("background", "conversation", "context_management", "previous_response_id", "prompt", "store")
"""Need answers that are kept; none is."""
_OF_CHAT = ("max_tokens", "max_completion_tokens", "messages", "n", "response_format")
"""Are called otherwise here, or do not exist."""
REFUSED_FIELDS[ResponsesRequest] = (
    *(name for name in Refused.__struct_fields__ if name not in Hints.__struct_fields__),
    *_STATEFUL,
    *_OF_CHAT,
)

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    """The text of an answer. `logprobs`: of its tokens, where they were asked for."""

    text: str
    annotations: list[Anything] = []
    logprobs: list[ChosenLogprob] = []


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    """The assistant's turn."""

    id: str
    status: Status
    content: list[OutputText]
    role: str = "assistant"


class OutputCall(Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function, whose result comes back under `call_id`."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(Struct, frozen=True):
    """As chat's `prompt_tokens_details`; 0 where no worker said, since SDKs require numbers."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Struct, frozen=True):
    """No model here reasons apart from its answer."""

    reasoning_tokens: int = 0


class ResponsesUsage(Struct, frozen=True):
    """Token counts of one answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct, frozen=True):
    """Why an answer was cut."""

    reason: str


class ResponseFailure(Struct, frozen=True):
    """Why an answer failed after it had begun."""

    code: str
    message: str


class ResponseObject(Struct, kw_only=True, frozen=True):
    """Answer of `POST /v1/responses`; events carry it, too. Of the request it repeats what shaped the answer."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputItem]
    usage: ResponsesUsage | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    completed_at: int | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, Anything]
    parallel_tool_calls: bool
    reasoning: dict[str, Anything]
    temperature: float
    text: dict[str, Anything]
    tool_choice: str | dict[str, Anything]
    tools: list[ResponsesTool]
    top_logprobs: int
    top_p: float
    user: str | None
    object: str = "response"
    background: bool = False
    previous_response_id: None = None
    service_tier: str = "default"
    store: bool = False
    truncation: str = "disabled"
