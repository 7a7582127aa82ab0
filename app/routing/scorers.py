"""How good a worker is for a request: each scorer is one view of it, a number in [0, 1], more is better (pure)."""

from dataclasses import dataclass

from engine.protocol import Location, Role, WorkerState
from fabric.cost import transfer_time
from fabric.topology import Place, die_of

HALF_QUEUE_TOKENS = 2048
"""Prompt tokens ahead in a prefill queue at which its load score is a half."""
HALF_SEQUENCES = 16
"""Sequences decoding together at which the load score is a half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker as a route sees it. Counts are the larger of what the worker announced and what was sent since."""

    worker_id: str
    role: Role
    state: WorkerState
    is_connected: bool
    model: str
    location: Location
    max_context_tokens: int
    num_sequences: int
    """Sequences running or waiting there."""
    num_queued_tokens: int
    """Prompt tokens that wait there to be computed."""
    kv_blocks_used: int
    kv_blocks_total: int


def queue_score(worker: Candidate) -> float:
    """How soon a prompt would be computed: 1 with nothing ahead of it."""
    return HALF_QUEUE_TOKENS / (HALF_QUEUE_TOKENS + worker.num_queued_tokens)


def batch_score(worker: Candidate) -> float:
    """How little company a sequence would have in each decode step: 1 when alone."""
    return HALF_SEQUENCES / (HALF_SEQUENCES + worker.num_sequences)


def memory_score(worker: Candidate) -> float:
    """The share of the worker's KV blocks that are free."""
    return 1.0 - worker.kv_blocks_used / worker.kv_blocks_total if worker.kv_blocks_total else 0.5


def local_score(num_local_tokens: int, num_prompt_tokens: int) -> float:
    """The share of the prompt that this worker computed lately and so need not fetch from the pool."""
    return min(1.0, num_local_tokens / num_prompt_tokens) if num_prompt_tokens else 0.0


def link_score(src: Candidate | None, dst: Candidate, num_bytes: int) -> float:
    """How near the prompt's KV is, as modelled UB seconds: 1 when it need not move, 0.5 at 10 ms."""
    if src is None or src.location == dst.location:
        return 1.0
    seconds = transfer_time(_place(src.location), _place(dst.location), num_bytes, "ub")
    return 0.01 / (0.01 + seconds)


def warm_link_costs() -> None:
    """Build the supernode's tables once, some 20 ms, so that the first request does not wait for them."""
    transfer_time(die_of(0, 0, 0), die_of(1, 0, 0), 1, "ub")


def _place(location: Location) -> Place:
    return die_of(location.node, location.npu, location.die)
