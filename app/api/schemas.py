"""The bodies of OpenAI's text endpoints as types: what is served, what is refused by name, what is ignored.

Decoding is strict (no strings for numbers, no booleans for integers). Fields that OpenAI or vLLM define and this
service does not act on fall in two classes: `REFUSED_FIELDS` lists those that would change the answer, so that
ignoring them would be a lie; `Hints` lists those that would not, so that they are accepted once their type is
right. Names nobody defined are ignored, as the SDKs expect.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=256)]
"""Narrows who finds a request's KV, within the caller's tenant: only requests with the same salt share it."""
Anything = Any


class StreamOptions(Struct, frozen=True):
    """How to stream. `include_usage` asks for one last chunk with the totals."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(Struct, frozen=True):
    """A piece of a message; of the `type`s only text is served, and a refusal of an earlier turn."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct, frozen=True):
    """A function's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """A call of a tool that the assistant asks for; results come back under its `id`."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class FunctionTool(Struct, frozen=True):
    """A function that may be called. `parameters`: the JSON schema of its arguments, counting exactly with `strict`."""

    name: str
    description: str | None = None
    parameters: dict[str, Anything] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    """A tool that may be called; only functions are served."""

    type: str
    function: FunctionTool | None = None


class Message(Struct, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(Struct, frozen=True):
    """A schema that the answer must satisfy. Without `strict` what a grammar cannot express is left out of account."""

    name: str
    schema: dict[str, Anything] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    """Shape of the answer: free, any JSON object, or a schema's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, frozen=True):
    """vLLM's way to say the shape of an answer; one of them."""

    json: dict[str, Anything] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Hints(Struct, kw_only=True, frozen=True):
    """Accepted and without effect on the answer here."""

    user: str | None = None
    metadata: dict[str, Anything] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Anything] | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class Refused(Hints, kw_only=True, frozen=True):
    """Would change the answer, and is not served: any value but null, false or empty is a 400 naming the field."""

    prompt_logprobs: Anything = None
    min_tokens: Anything = None
    bad_words: Anything = None
    use_beam_search: Anything = None
    include_stop_str_in_output: Anything = None
    logits_processors: Anything = None


class Sampling(Refused, kw_only=True, frozen=True):
    """How to pick tokens: what chat and completions share."""

    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10.0)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    max_tokens: PositiveInt | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    """Order among the requests of the same tenant that wait: lower goes first."""
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Anything] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    """A grammar in llguidance's variant of Lark."""


class ChatRequest(Sampling, kw_only=True, frozen=True):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    tool_choice: str | dict[str, Anything] | None = None
    function_call: str | dict[str, Anything] | None = None
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None
    functions: Anything = None
    audio: Anything = None
    prediction: Anything = None
    web_search_options: Anything = None
    continue_final_message: Anything = None
    echo: Anything = None


class CompletionRequest(Sampling, kw_only=True, frozen=True):
    """Body of `POST /v1/completions`. `prompt`: text, texts, token ids, or lists of token ids."""

    model: str
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    """The answer begins with the prompt; `logprobs` then holds its tokens, too, and `max_tokens` may be 0."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """vLLM's field: log-probabilities of the prompt's tokens beside the answer; not for streams."""
    suffix: Anything = None
    prompt_embeds: Anything = None
    response_format: ResponseFormat | None = None


_OWN_REFUSED = [name for name in Refused.__struct_fields__ if name not in Hints.__struct_fields__]
REFUSED_FIELDS: dict[type[Struct], tuple[str, ...]] = {
    ChatRequest: (
        *_OWN_REFUSED,
        *(
            "functions",
            "audio",
            "prediction",
            "web_search_options",
            "continue_final_message",
            "echo",
        ),
    ),
    CompletionRequest: (
        *(name for name in _OWN_REFUSED if name != "prompt_logprobs"),
        "suffix",
        "prompt_embeds",
    ),
}


class RoleChange(Struct, frozen=True):
    """Body of `POST /api/workers/{id}/role`."""

    role: Literal["prefill", "decode", "both"]


class PromptTokensDetails(Struct, frozen=True):
    """`cached_tokens`: prompt tokens whose KV was found, in the worker or in the pool, instead of computed.

    `cache_write_tokens`: prompt tokens whose KV this request brought into the pool, in whole blocks.
    """

    cached_tokens: int
    cache_write_tokens: int


class Usage(Struct, frozen=True, omit_defaults=True):
    """Token counts of one answer; `prompt_tokens_details` is left out while unknown."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(Struct, frozen=True):
    """A token and its natural-log probability; `bytes` are its UTF-8 bytes, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(Struct, frozen=True):
    """The produced token, and the best alternatives at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Log-probabilities of a chat choice."""

    content: list[ChosenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, frozen=True):
    """Log-probabilities of a text choice: parallel lists over its tokens. `text_offset` counts characters.

    Null stands where a prompt's first token was echoed: nothing is before it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(Struct, frozen=True):
    """The assistant's turn: text, calls of tools, or text and then calls."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct, frozen=True):
    """Answer of `POST /v1/chat/completions` without `stream`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"
    service_tier: None = None


class PromptLogprob(Struct, frozen=True):
    """A token at a place in the prompt. `rank`: 1 for the likeliest; null when it is not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


class TextChoice(Struct, frozen=True):
    """One of `n` × prompts answers.

    `prompt_logprobs`: for each of the prompt's tokens itself and the likeliest by token id; null for the first.
    """

    index: int
    text: str
    finish_reason: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class Completion(Struct, frozen=True):
    """Answer of `POST /v1/completions` without `stream`."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "text_completion"


class ModelCard(Struct, frozen=True):
    """One served model. `max_model_len`: context in tokens."""

    id: str
    created: int
    max_model_len: int
    owned_by: str = "cloudmatrix"
    object: str = "model"


class ModelList(Struct, frozen=True):
    """Answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: str = "list"
