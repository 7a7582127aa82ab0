"""A request inside a worker: its tokens, how far their KV is computed, the blocks that hold it, and what to report.

    queued -> loading -> running -> closing -> over
       ^______________________|                        preempted: blocks given back, tokens kept

queued:   waits for room. Holds no blocks.
loading:  holds its blocks; known KV is on its way in from the pool.
running:  takes part in engine steps: prefill chunks first, then one token (or a verified draft) a step.
closing:  no more steps; waits until its published blocks are acknowledged, so that its report is whole.
"""

import enum
from collections import Counter
from dataclasses import dataclass, field

from engine.grammar import Matcher
from engine.protocol import FinishReason, Handoff, Report, Reuse, Role, SamplingParams, Submit
from engine.speculation import Guesser
from engine.timeline import Timeline
from fabric.ledger import Transfer
from memory_pool.keys import block_keys, content_keys, namespace_at


class Status(enum.Enum):
    """Where a sequence is in its life; see the top of this file."""

    QUEUED = "queued"
    LOADING = "loading"
    RUNNING = "running"
    CLOSING = "closing"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class KeyScheme:
    """What the names of a worker's blocks are made from besides tokens and namespace."""

    fingerprint: str
    block_tokens: int

    def keys(
        self, tokens: list[int], namespace: str, salt: str = "", num_shared_blocks: int = 0
    ) -> list[bytes]:
        """Names of the full blocks of `tokens`."""
        return block_keys(
            tokens,
            block_tokens=self.block_tokens,
            fingerprint=self.fingerprint,
            namespace=namespace,
            salt=salt,
            num_shared_blocks=num_shared_blocks,
        )

    def contents(self, tokens: list[int], num_blocks: int) -> list[bytes]:
        """Names of the first full blocks of `tokens` whoever wrote them."""
        return content_keys(
            tokens[: num_blocks * self.block_tokens],
            block_tokens=self.block_tokens,
            fingerprint=self.fingerprint,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """One submitted request. `link` is what it came over; `(link, request_id)` is its identity in the worker.

    `tokens` are those of the prompt and then the generated ones; the KV of the first `num_computed` is in `blocks`.
    `keys` are the names of the full blocks of `tokens`.
    """

    link: str
    request_id: str
    phase: Role
    sampling: SamplingParams
    namespace: str
    priority: int
    arrived_at: float
    expires_at: float | None
    handoff: Handoff | None
    tokens: list[int]
    num_prompt: int
    scheme: KeyScheme
    timeline: Timeline
    keys: list[bytes]
    cache_salt: str = ""
    num_shared_blocks: int = 0
    status: Status = Status.QUEUED
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    """Guessed next tokens, verified by the coming step."""
    guesser: Guesser | None = None
    """None: no drafts. A penalty changes the logits of a row by the tokens before it, so its row cannot be verified
    beside theirs."""
    finish_reason: FinishReason | None = None
    transfers: list[Transfer] = field(default_factory=list)
    num_publishing: int = 0
    """Blocks on their way out that are not yet acknowledged."""
    unpublished: list[int] = field(default_factory=list)
    """Blocks filled since the last token, which wait for the next one to be published."""
    num_published: int = 0
    """Leading full blocks handed to the publisher, or known to be in the pool."""
    written_tokens: int = 0
    """Prompt tokens whose blocks the pool did not have before."""
    reuse: Reuse | None = None
    local_tokens: int = 0
    fetched_tokens: int = 0
    computed_tokens: int = 0
    num_accounted: int = 0
    """Leading tokens whose KV is counted as local, fetched or computed."""
    generated_counts: Counter[int] | None = None
    """How often each token was generated; kept only when a penalty asks for it."""
    prompt_set: frozenset[int] | None = None
    matcher: Matcher | None = None
    """Where its grammar stands, behind `tokens`."""
    traceparent: str = ""
    """The span that this belongs under; empty when it is not traced."""
    tracestate: str = ""

    @classmethod
    def from_submit(
        cls,
        submit: Submit,
        *,
        link: str,
        scheme: KeyScheme,
        received_at: float,
        matcher: Matcher | None = None,
    ) -> "Sequence":
        """The sequence of a submitted request, queued. `matcher`: at the beginning of its grammar, if it has one."""
        if matcher is not None:
            for token in submit.generated_tokens:
                matcher.accept(token)
        tokens = [*submit.prompt_tokens, *submit.generated_tokens]
        sampling = submit.sampling
        counts = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        return cls(
            link=link,
            request_id=submit.request_id,
            phase=submit.phase,
            sampling=sampling,
            namespace=submit.namespace,
            priority=submit.priority,
            arrived_at=received_at,
            expires_at=None if submit.expires_in_s is None else received_at + submit.expires_in_s,
            handoff=submit.handoff,
            tokens=tokens,
            num_prompt=len(submit.prompt_tokens),
            scheme=scheme,
            timeline=Timeline(received_at),
            keys=scheme.keys(tokens, submit.namespace, submit.cache_salt, submit.num_shared_blocks),
            cache_salt=submit.cache_salt,
            num_shared_blocks=submit.num_shared_blocks,
            guesser=None if counts else Guesser(),
            generated_counts=Counter(submit.generated_tokens) if counts else None,
            prompt_set=frozenset(submit.prompt_tokens) if sampling.repetition_penalty != 1.0 else None,
            matcher=matcher,
            traceparent=submit.traceparent,
            tracestate=submit.tracestate,
        )

    @property
    def identity(self) -> tuple[str, str]:
        """The link it came over and its request id."""
        return self.link, self.request_id

    @property
    def hands_over(self) -> bool:
        """Whether another worker will want its blocks, so that the pool must hold them until then."""
        return self.phase == "prefill"

    @property
    def lease(self) -> str:
        """In whose name the pool holds blocks that are handed over."""
        return f"handoff {self.request_id}"

    def namespace_at(self, index: int) -> str:
        """The namespace of the block at `index`."""
        return namespace_at(index, namespace=self.namespace, num_shared_blocks=self.num_shared_blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and generated."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, here and where the request was before."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Known tokens without KV. At least 1 while running; exactly 1 when it decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def num_draftable(self) -> int:
        """How many tokens it may still produce besides the next."""
        return self.sampling.max_tokens - self.num_generated - 1

    @property
    def computes_all(self) -> bool:
        """Whether its prompt's log-probabilities are still being computed, which takes every row of it."""
        return (
            self.sampling.prompt_logprobs is not None
            and not self.num_generated
            and self.num_computed < self.num_prompt - 1
        )

    def allowed_part(self, draft: list[int]) -> list[int]:
        """As much of a draft as its grammar would take."""
        return draft if self.matcher is None else draft[: self.matcher.allowed_part(draft)]

    def append(self, token: int, *, max_context_tokens: int) -> FinishReason | None:
        """Take in a sampled token; the reason when it is the last one."""
        self.tokens.append(token)
        if self.generated_counts is not None:
            self.generated_counts[token] += 1
        if len(self.tokens) // self.scheme.block_tokens > len(self.keys):
            self.keys = self.scheme.keys(self.tokens, self.namespace, self.cache_salt, self.num_shared_blocks)
        if token in self.sampling.stop_token_ids or self._completes(token):
            self.finish_reason = "stop"
        elif self.num_generated >= self.sampling.max_tokens or len(self.tokens) >= max_context_tokens:
            self.finish_reason = "length"
        return self.finish_reason

    def _completes(self, token: int) -> bool:
        if self.matcher is None:
            return False
        self.matcher.accept(token)
        return self.matcher.is_complete and self.matcher.error is None

    def report(self, worker_id: str) -> Report:
        """What this worker's part came to, so far."""
        return Report(
            worker_id=worker_id,
            cached_tokens=min(self.local_tokens + self.fetched_tokens, self.num_prompt),
            local_tokens=min(self.local_tokens, self.num_prompt),
            computed_tokens=self.computed_tokens,
            phases=self.timeline.phases(),
            transfers=list(self.transfers),
            written_tokens=self.written_tokens,
            reuse=self.reuse,
        )
