"""What a gateway and a worker say to each other: tokens and names, never text, never KV bytes.

One WebSocket (`/link` on the worker) joins each gateway to each worker. A message is a MessagePack array of the
structs below, so that one engine step costs one message however many sequences it served. When a link drops, the
worker cancels what came over it; the gateway fails or retries what it had sent.

All durations are seconds on the clock of the process that measured them; instants of two processes are never
subtracted. `start_s` of a phase counts from the moment the worker received the `Submit`.
"""

from typing import Literal

import msgspec

from fabric.ledger import Transfer

PROTOCOL_VERSION = 1

Role = Literal["prefill", "decode", "both"]
WorkerState = Literal["starting", "ready", "draining"]
FinishReason = Literal["stop", "length", "abort"]
"""`stop`: a stop token was produced; `length`: `max_tokens` or the context is used up; `abort`: cancelled."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick the next token. Temperature 0 is greedy. `seed` and the token's position fix every draw."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: none wanted; k: the chosen token's log-probability and the k best alternatives."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from the second on; they are all computed anew, whatever is cached."""
    grammar: str | None = None
    """What the generated tokens must spell, in llguidance's serialised form; see `engine/grammar.py`."""


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence's KV by name: whole blocks, then the tail. Together they hold `num_tokens` tokens.

    `lease`: in whose name the pool holds the blocks for whoever takes them over; it lets go when it has them.
    """

    block_keys: list[bytes]
    tail_key: bytes | None
    num_tokens: int
    lease: str = ""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Serve a sequence.

    `phase` prefill: compute the prompt's KV, publish it, produce the first token, answer `Prefilled` and stop.
    `phase` decode: continue after `generated_tokens`, taking KV from `handoff` and recomputing what is missing.
    `phase` both: the whole way on this worker.
    `namespace` is charged for the blocks; `cache_salt` narrows who finds them; the first `num_shared_blocks` are of
    the shared region (`memory_pool.keys`).
    `expires_in_s`: how long from receipt the work may still wait unstarted; None is for ever.
    `traceparent`: W3C Trace Context of the span that this work belongs under; empty when it is not traced.
    `tracestate`: what came with it.
    """

    request_id: str
    phase: Role
    prompt_tokens: list[int]
    sampling: SamplingParams
    namespace: str = "default"
    cache_salt: str = ""
    num_shared_blocks: int = 0
    generated_tokens: list[int] = []
    handoff: Handoff | None = None
    expires_in_s: float | None = None
    priority: int = 0
    traceparent: str = ""
    tracestate: str = ""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Forget the request; its blocks and leases are freed. Unknown ids are ignored."""

    request_id: str


class Prefetch(msgspec.Struct, frozen=True, kw_only=True, tag="prefetch"):
    """To a decode worker while prefill still runs: these blocks exist now and will be wanted by `request_id`.

    `tokens`: those of the blocks, block after block; the pool verifies what it reads against them.
    `num_shared_blocks`: how many of them, from the first, are of the shared region and not of `namespace`.
    """

    request_id: str
    block_keys: list[bytes]
    tokens: list[int] = []
    namespace: str = "default"
    num_shared_blocks: int = 0


ToWorker = Submit | Cancel | Prefetch


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a produced token before temperature, with the best alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a request's life: `queue`, `lookup`, `fetch`, `prefill`, `publish` or `decode`."""

    phase: str
    start_s: float
    duration_s: float


class Reuse(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker found of a sequence's KV in the pool, behind its own blocks, and whether it was worth fetching.

    `fetch_s` and `compute_s`: what fetching or computing all `found_blocks` was predicted to take, from which came how
    many it chose to fetch; `fetched_blocks` are those that came whole. `fetch_s` is None when nothing was known of the
    pool's speed. `miss_reason` says why the first block that was not there was not: `never_seen`, `evicted`,
    `damaged`, `other_namespace` or `unavailable`.
    """

    found_blocks: int
    chosen_blocks: int
    fetched_blocks: int
    fetch_s: float | None
    compute_s: float
    miss_reason: str | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker's part in a request came to.

    `cached_tokens`: prompt tokens whose KV was not computed here, from local blocks (`local_tokens`) or the pool.
    `computed_tokens`: prompt (and, after a lost block, generated) tokens run through the model here.
    `written_tokens`: prompt tokens whose blocks it brought into the pool. `reuse` is None where nothing was looked up.
    """

    worker_id: str
    cached_tokens: int
    local_tokens: int
    computed_tokens: int
    phases: list[Phase]
    transfers: list[Transfer]
    written_tokens: int = 0
    reuse: Reuse | None = None


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Newly produced tokens of a request, in order. A stop token is included, last."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None


class PromptScored(msgspec.Struct, frozen=True, kw_only=True, tag="prompt_scored"):
    """Log-probabilities of the prompt's tokens from `first` on, one chunk of the prompt after another."""

    request_id: str
    first: int
    logprobs: list[TokenLogprob]


class BlocksPublished(msgspec.Struct, frozen=True, kw_only=True, tag="blocks_published"):
    """A prefill worker's progress: these blocks of the request can be fetched now."""

    request_id: str
    block_keys: list[bytes]


class Prefilled(msgspec.Struct, frozen=True, kw_only=True, tag="prefilled"):
    """The end of a prefill phase that goes on elsewhere; the first token went out in `Tokens` before."""

    request_id: str
    handoff: Handoff
    report: Report


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The end of a request: its last tokens went out in `Tokens` before."""

    request_id: str
    finish_reason: FinishReason
    report: Report


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The worker could not serve the request.

    `code`: `overloaded` (try elsewhere), `draining` (try elsewhere), `expired` (waited too long), `too_long` (does
    not fit this worker's KV), `invalid` (its grammar cannot be followed), `internal`.
    """

    request_id: str
    code: Literal["overloaded", "draining", "expired", "too_long", "invalid", "internal"]
    message: str


FromWorker = Tokens | PromptScored | BlocksPublished | Prefilled | Finished | Failed


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's place on the virtual supernode: node 0..47, NPU 0..7 of the node, die 0..1 of the NPU."""

    node: int
    npu: int
    die: int


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker announces of itself with every heartbeat; `url` is its HTTP base."""

    id: str
    role: Role
    state: WorkerState
    model: str
    fingerprint: str
    """Hex digest of weights and KV layout: blocks are shared between workers of equal fingerprint only."""
    pid: int
    url: str
    location: Location
    block_tokens: int
    kv_bytes_per_token: int
    max_context_tokens: int
    running: int
    waiting: int
    queued_tokens: int
    """Prompt tokens waiting to be computed."""
    kv_blocks_used: int
    kv_blocks_total: int


_to_worker = msgspec.msgpack.Decoder(list[ToWorker])
_from_worker = msgspec.msgpack.Decoder(list[FromWorker])
_encoder = msgspec.msgpack.Encoder()


def encode(messages: list[Submit | Cancel | Prefetch] | list[FromWorker]) -> bytes:
    """One link message."""
    return _encoder.encode(messages)


def decode_to_worker(data: bytes) -> list[ToWorker]:
    """What a gateway sent. Raises `msgspec.ValidationError` when it is not that."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> list[FromWorker]:
    """What a worker sent. Raises `msgspec.ValidationError` when it is not that."""
    return _from_worker.decode(data)
