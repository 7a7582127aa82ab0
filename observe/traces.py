"""Traces as OpenTelemetry shows them, over processes: contexts after W3C `traceparent`, spans made when work is over.

A span is made of instants that the service notes anyway, so that a request that is not traced costs nothing. Instants
are of one monotonic clock of the process and laid on the wall clock when a span is recorded.
"""

import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

VARIABLE = "CLOUDMATRIX_OTEL"
Mode = Literal["off", "console", "otlp"]
Kind = Literal["internal", "server", "client"]
Attribute = str | int | float | bool | tuple[str, ...]

incoming: ContextVar[tuple[str, str]] = ContextVar("incoming", default=("", ""))
"""The `traceparent` and the `tracestate` that came with the call being served; empty without them."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span's name in the world: 16 bytes for the trace, 8 for the span; `parent_id` is None at the root.

    `state`: what vendors on the way here said of the trace (`tracestate`), handed on as it came."""

    trace_id: int
    span_id: int
    parent_id: int | None = None
    state: str = ""

    @property
    def traceparent(self) -> str:
        """As W3C Trace Context writes it, sampled."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"

    def child(self) -> "TraceContext":
        """A new span below this one."""
        return TraceContext(self.trace_id, _new_id(8), self.span_id, self.state)


def context_of(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """A new span below the caller's, or the root of a new trace without a usable `traceparent`; None when the caller
    has decided that this trace is not recorded (its `sampled` flag is 0)."""
    parts = traceparent.strip().split("-")
    try:
        version, trace, parent, flags = (int(part, 16) for part in parts[:4])
    except ValueError:
        return TraceContext(_new_id(16), _new_id(8))
    lengths = [len(part) for part in parts[:4]]
    if lengths != [2, 32, 16, 2] or not trace or not parent or version == 255 or (not version and parts[4:]):
        return TraceContext(_new_id(16), _new_id(8))
    return TraceContext(trace, _new_id(8), parent, tracestate.strip()) if flags & 1 else None


def _new_id(num_bytes: int) -> int:
    return int.from_bytes(secrets.token_bytes(num_bytes)) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Work that is over. Instants in seconds of a monotonic clock."""

    name: str
    context: TraceContext
    started_at: float
    ended_at: float
    kind: Kind = "internal"
    attributes: Mapping[str, Attribute | None]
    """Those that are None are left out."""
    error: str | None = None


class Tracer(Protocol):
    """Takes spans; to be asked from any thread."""

    def record(self, spans: Sequence[Span], now: float) -> None:
        """Export these in time; `now` is this instant on the clock of theirs.

        Returns at once and never fails: what cannot be sent is dropped.
        """

    def close(self) -> None:
        """Send what is left."""


def mode_of(text: str) -> Mode:
    """Raises ValueError for anything but off, console, otlp and nothing, which is off."""
    for mode in get_args(Mode):
        if text == mode:
            return mode  # type: ignore[no-any-return]  # get_args forgets that these are Modes
    if text:
        raise ValueError(f"{VARIABLE}={text}: choose off, console or otlp")
    return "off"


def new_tracer(mode: Mode, *, service: str, instance: str) -> Tracer | None:
    """None when off. `console` writes JSON to standard error; `otlp` posts to OTEL_EXPORTER_OTLP_ENDPOINT (default
    http://localhost:4318) as the OpenTelemetry SDK does, whose other variables hold, too."""
    return None if mode == "off" else _Exporting(mode, service, instance)


class _Exporting:
    """Over the OpenTelemetry SDK, which is loaded only when traces are wanted."""

    def __init__(self, mode: Mode, service: str, instance: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporter: SpanExporter
        if mode == "console":
            exporter = ConsoleSpanExporter(
                out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n"
            )
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        self._resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._processor = BatchSpanProcessor(exporter)

    def record(self, spans: Sequence[Span], now: float) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

        wall_s = time.time() - now

        def name(context: TraceContext, span_id: int, *, is_remote: bool) -> SpanContext:
            state = TraceState.from_header([context.state]) if context.state else None
            return SpanContext(context.trace_id, span_id, is_remote, TraceFlags(TraceFlags.SAMPLED), state)

        for span in spans:
            context = span.context
            parent_id = context.parent_id
            self._processor.on_end(
                ReadableSpan(
                    span.name,
                    context=name(context, context.span_id, is_remote=False),
                    parent=None
                    if parent_id is None
                    else name(context, parent_id, is_remote=span.kind == "server"),
                    resource=self._resource,
                    attributes={key: value for key, value in span.attributes.items() if value is not None},
                    kind=SpanKind[span.kind.upper()],
                    status=Status(StatusCode.UNSET)
                    if span.error is None
                    else Status(StatusCode.ERROR, span.error),
                    start_time=round((wall_s + span.started_at) * 1e9),
                    end_time=round((wall_s + span.ended_at) * 1e9),
                )
            )

    def close(self) -> None:
        self._processor.shutdown()  # type: ignore[no-untyped-call]  # untyped in the SDK
