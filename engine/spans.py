"""A worker's part of a request's trace: one span for its stay here, one below it for each phase. Pure."""

from engine.protocol import Report
from engine.sequence import Sequence
from observe.traces import Attribute, Span, context_of

NAMES = {
    "lookup": "pool.lookup",
    "fetch": "pool.fetch",
    "publish": "pool.publish",
    "prefill": "prefill.compute",
}
"""Of phases, where a trace calls them otherwise."""
STAYS = {"prefill": "worker.prefill", "decode": "worker.decode", "both": "worker.serve"}


def spans_of(sequence: Sequence, report: Report, error: str | None) -> list[Span]:
    """The spans of a sequence that is over; none when its trace is not recorded."""
    context = context_of(sequence.traceparent, sequence.tracestate)
    if context is None:
        return []
    stay: dict[str, Attribute | None] = {
        "cloudmatrix.request_id": sequence.request_id,
        "cloudmatrix.worker": report.worker_id,
        # Not under `gen_ai.usage`: the gateway's span has a request's usage, and sums over spans would count it twice.
        "cloudmatrix.prompt_tokens": sequence.num_prompt,
        "cloudmatrix.generated_tokens": sequence.num_generated,
        "cloudmatrix.cached_tokens": report.cached_tokens,
        "cloudmatrix.computed_tokens": report.computed_tokens,
        "cloudmatrix.finish_reason": sequence.finish_reason,
    }
    moved = {
        "fetch": sum(t.num_bytes for t in report.transfers if t.kind.startswith("fetch")),
        "publish": sum(t.num_bytes for t in report.transfers if t.kind.startswith("publish")),
    }
    ended_at = sequence.arrived_at
    phases = []
    for phase in report.phases:
        began_at = sequence.arrived_at + phase.start_s
        ended_at = began_at + phase.duration_s
        phases.append(
            Span(
                name=NAMES.get(phase.phase, phase.phase),
                context=context.child(),
                started_at=began_at,
                ended_at=ended_at,
                attributes={
                    "cloudmatrix.request_id": sequence.request_id,
                    "cloudmatrix.num_bytes": moved.get(phase.phase),
                },
            )
        )
    whole = Span(
        name=STAYS[sequence.phase],
        context=context,
        started_at=sequence.arrived_at,
        ended_at=ended_at,
        kind="server",
        attributes=stay,
        error=error,
    )
    return [whole, *phases]
