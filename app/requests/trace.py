"""A request's trace as the gateway saw it: the request, its own phases, and its stays at workers. Pure.

Attributes have OpenTelemetry's names for generative AI where there are any. Those are still in development there.

request ─┬─ pool.lookup, queue, route        the gateway's own
         ├─ prefill, decode, serve           a stay at a worker, whose spans lie below it
         └─ handoff                          from the end of the one stay to the first token of the next
"""

from collections.abc import Mapping
from dataclasses import dataclass

from app.requests.record import RequestRecord
from engine.protocol import Role
from observe.traces import Attribute, Span, TraceContext

STAYS = {"prefill": "prefill", "decode": "decode", "both": "serve"}
GATEWAY_PHASES = {"lookup": "pool.lookup"}
OPERATIONS = {"chat": "chat", "responses": "chat", "completions": "text_completion"}
"""What OpenTelemetry calls the endpoints of records."""


@dataclass(slots=True, kw_only=True, eq=False)
class Stay:
    """Work that was sent to a worker. `context` is what the worker's spans are put under."""

    context: TraceContext
    phase: Role
    worker_id: str
    choice: int
    routed_at: float | None
    """When a worker began to be looked for; None when an earlier route named it."""
    sent_at: float
    after: "Stay | None"
    """The stay that handed over to this one."""
    first_token_at: float | None = None
    ended_at: float | None = None
    error: str | None = None


class RequestTrace:
    """Collects the stays of one request. Instants are of the gateway's monotonic clock. `asked`: attributes of how it
    is to be answered."""

    def __init__(self, context: TraceContext, asked: Mapping[str, Attribute]) -> None:
        self.context = context
        self._asked = asked
        self.stays: list[Stay] = []

    def stay(
        self,
        *,
        phase: Role,
        worker_id: str,
        choice: int,
        routed_at: float | None,
        sent_at: float,
        after: Stay | None,
    ) -> Stay:
        """Work goes to a worker now."""
        stay = Stay(
            context=self.context.child(),
            phase=phase,
            worker_id=worker_id,
            choice=choice,
            routed_at=routed_at,
            sent_at=sent_at,
            after=after,
        )
        self.stays.append(stay)
        return stay

    def spans(self, record: RequestRecord, now: float) -> list[Span]:
        """All of it, once the answer is over and no worker owes a report."""
        ended_at = record.ended_at if record.ended_at is not None else now
        same: dict[str, Attribute | None] = {"cloudmatrix.request_id": record.request_id}
        reasons = tuple(record.finish_reasons[choice] for choice in sorted(record.finish_reasons))
        spans = [
            Span(
                name="request",
                context=self.context,
                started_at=record.arrived_at,
                ended_at=ended_at,
                kind="server",
                attributes={
                    **same,
                    **self._asked,
                    "cloudmatrix.endpoint": record.endpoint,
                    "cloudmatrix.tenant": record.tenant,
                    "cloudmatrix.status": record.status,
                    "cloudmatrix.cached_tokens": record.cached_tokens,
                    "gen_ai.operation.name": OPERATIONS.get(record.endpoint),
                    "gen_ai.provider.name": "cloudmatrix",
                    "gen_ai.request.model": record.model,
                    "gen_ai.request.stream": record.stream,
                    "gen_ai.response.model": record.model,
                    "gen_ai.response.finish_reasons": reasons or None,
                    "gen_ai.usage.input_tokens": record.prompt_tokens,
                    "gen_ai.usage.output_tokens": record.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                    "gen_ai.usage.cache_write.input_tokens": record.written_tokens,
                },
                error=record.error,
            )
        ]
        for phase, began_at, duration_s, where, _ in record.phases:
            if where == "gateway":
                name = GATEWAY_PHASES.get(phase, phase)
                spans.append(self._own(name, began_at, began_at + duration_s, same))
        for stay in self.stays:
            at = {**same, "cloudmatrix.worker": stay.worker_id, "cloudmatrix.choice": stay.choice}
            if stay.routed_at is not None:
                spans.append(self._own("route", stay.routed_at, stay.sent_at, at))
            if stay.after is not None and stay.after.ended_at is not None and stay.first_token_at is not None:
                spans.append(self._own("handoff", stay.after.ended_at, stay.first_token_at, at))
            spans.append(
                Span(
                    name=STAYS[stay.phase],
                    context=stay.context,
                    started_at=stay.sent_at,
                    ended_at=stay.ended_at if stay.ended_at is not None else max(ended_at, stay.sent_at),
                    kind="client",
                    attributes=at,
                    error=stay.error,
                )
            )
        return spans

    def _own(
        self, name: str, began_at: float, ended_at: float, attributes: dict[str, Attribute | None]
    ) -> Span:
        context = self.context.child()
        return Span(name=name, context=context, started_at=began_at, ended_at=ended_at, attributes=attributes)
