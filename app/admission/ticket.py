"""A request's place in the queue in front of the workers."""

from dataclasses import dataclass
from typing import Literal

OUTPUT_WEIGHT = 2.0
"""Virtual tokens that one output token counts for, a prompt token counting one: the ratio of the Virtual Token Counter
paper (Sheng et al., OSDI 2024), taken there from usual prices."""
DEFAULT_TENANT = "default"

State = Literal["new", "queued", "released", "over"]
Loss = Literal["deadline", "late", "displaced"]
"""Why a queued request is dropped: its caller gave up; it would miss the target; a poorer tenant needed the room."""
Refusal = Literal["full", "predicted_late", "predicted_deadline"]
"""Why a request is not queued: no room; it would miss the target; it would miss its caller's deadline."""


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket:
    """What admission needs to know of a request. Token counts are over all its prompts and choices.

    `tier` is set by the operator: lower tiers go first, whatever the shares. `priority` is the caller's own order among
    its requests, lower first as in vLLM's API. Instants are of the clock whose `now` is passed to the decisions.
    """

    tenant: str = DEFAULT_TENANT
    weight: float = 1.0
    tier: int = 0
    priority: int = 0
    prompt_tokens: int
    """Prompt tokens that are to be computed, as far as is known: without those whose KV is expected to be found."""
    output_tokens: int
    """Output tokens asked for, at most."""
    num_sequences: int
    arrived_at: float
    deadline_at: float | None = None
    state: State = "new"
    queued_at: float = 0.0
    released_at: float = 0.0
    began_at: float | None = None
    """When its first token came."""
    awaited_tokens: int = 0
    """Prompt tokens that were with the workers when it was released, its own among them."""
    uncomputed_tokens: int = 0
    """Of a released request: prompt tokens that are still to be computed."""
    open_sequences: int = 0
    """Of a released request: choices that are not over."""
    cost: float = 0.0
    """Virtual tokens it is expected to take; charged when it is released, settled when it is over."""
