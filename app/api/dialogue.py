"""What chat and responses have in common: from a conversation, its tools and its shape to an answer under way."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from app.api.answers import Desk, deadline_at
from app.api.schemas import ContentPart, Message, ResponseFormat, Sampling, Tool
from app.requests.constraint import constraint
from app.requests.conversation import prompt_tokens
from app.requests.generation import Generation, Order
from app.requests.record import RequestRecord
from app.requests.sampling import sampling_params, stop_strings
from app.requests.served import ServedModel, fewest_tokens
from app.requests.tools import offered, tool_grammar


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """What the next turn follows on, and what it may be. `max_tokens`: of the answer, None where nobody said."""

    messages: Sequence[Message]
    tools: Sequence[Tool]
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    response_format: ResponseFormat | None
    max_tokens: int | None
    logprobs: int | None


async def begin(
    desk: Desk,
    request: Request,
    record: RequestRecord,
    model: ServedModel,
    body: Sampling,
    dialogue: Dialogue,
) -> Generation:
    """Start the next turn. Raises GatewayError; fields go by their names in a chat."""
    tools = dialogue.tools
    record.stream = bool(body.stream)
    gives_up_at, priority = deadline_at(request, record, record.stream), body.priority or 0
    desk.generator.check(
        record,
        model,
        prompt_tokens=fewest_dialogue_tokens(dialogue.messages),
        num_sequences=body.n or 1,
        priority=priority,
        deadline_at=gives_up_at,
    )
    offer = offered(tools, dialogue.tool_choice, parallel=dialogue.parallel_tool_calls)
    functions = [] if offer is None else [tool.function for tool in tools if tool.function]
    prompt = await prompt_tokens(model, dialogue.messages, functions)
    sampling = sampling_params(
        body,
        model,
        max_tokens=model.max_tokens(len(prompt), dialogue.max_tokens, None, "messages"),
        logprobs=dialogue.logprobs,
        grammar=await constraint(body, dialogue.response_format)
        if offer is None
        else await tool_grammar(offer, body, dialogue.response_format),
    )
    record.add_phase("prepare", record.arrived_at, time.monotonic())
    order = Order(
        prompts=[prompt],
        sampling=[sampling],
        n=body.n or 1,
        stops=stop_strings(body.stop),
        continues_text=False,
        deadline_at=gives_up_at,
        cache_salt=body.cache_salt or "",
        priority=priority,
        names_max_tokens=dialogue.max_tokens is not None,
        offers_tools=offer is not None,
    )
    return await desk.generator.begin(order, model, record)


def fewest_dialogue_tokens(messages: Sequence[Message]) -> int:
    """What the contents of a conversation have at least."""
    texts = [
        part.text or "" if isinstance(part, ContentPart) else part
        for message in messages
        for part in ([message.content] if isinstance(message.content, str) else message.content or ())
    ]
    return sum(map(fewest_tokens, texts)) or 1
