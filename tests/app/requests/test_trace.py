"""What a request's trace says of it, in OpenTelemetry's words."""

import pytest

from app.requests.record import RequestRecord
from app.requests.trace import RequestTrace
from observe.traces import TraceContext


@pytest.mark.parametrize(
    ("endpoint", "operation"),
    [("chat", "chat"), ("responses", "chat"), ("completions", "text_completion")],
)
def test_a_request_is_told_in_the_names_for_generative_ai(endpoint: str, operation: str) -> None:
    record = RequestRecord("req_1", endpoint, 1_700_000_000, 5.0)
    record.model, record.stream, record.num_choices = "m", True, 2
    record.prompt_tokens, record.completion_tokens, record.cached_tokens = 40, 9, 32
    record.finish_reasons = {1: "length", 0: "stop"}
    record.end("completed", 7.0)
    (span,) = RequestTrace(TraceContext(1, 2), {"gen_ai.request.max_tokens": 7}).spans(record, 8.0)
    told = {name: value for name, value in span.attributes.items() if name.startswith("gen_ai.")}
    assert told == {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "cloudmatrix",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 32,
        "gen_ai.usage.cache_write.input_tokens": None,
    }


def test_who_was_turned_away_has_no_reason_to_end() -> None:
    record = RequestRecord("req_1", "chat", 1_700_000_000, 5.0)
    record.end("failed", 5.1, "too much waits")
    (span,) = RequestTrace(TraceContext(1, 2), {}).spans(record, 6.0)
    assert span.attributes["gen_ai.response.finish_reasons"] is None
    assert span.error == "too much waits"
