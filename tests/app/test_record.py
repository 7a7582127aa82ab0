"""Records lay workers' phases on the gateway's clock, and nothing exceeds the request."""

from app.requests.history import History
from app.requests.record import RequestRecord
from engine.protocol import Phase, Report
from fabric.ledger import price
from tests.app.conftest import MODEL, Gateway


def report(worker_id: str, *phases: tuple[str, float, float]) -> Report:
    return Report(
        worker_id=worker_id,
        cached_tokens=0,
        local_tokens=0,
        computed_tokens=0,
        phases=[Phase(phase=name, start_s=start, duration_s=length) for name, start, length in phases],
        transfers=[price("fetch", "cpu:1", "die:0", 1000, 0.25), price("fetch", "cpu:2", "die:0", 500, 0.5)],
    )


def test_phases_are_anchored_at_the_send_and_cut_at_the_end() -> None:
    record = RequestRecord("req_1", "chat", 1, arrived_at=100.0)
    record.add_phase("prepare", 100.0, 100.5)
    record.add_report(report("d", ("queue", 0.0, 0.5), ("decode", 0.5, 4.0), ("publish", 9.0, 1.0)), 102.0, 0)
    record.end("completed", 105.0)
    view = record.view()
    assert [(p.phase, p.start_s, p.duration_s, p.where) for p in view.timeline] == [
        ("prepare", 0.0, 0.5, "gateway"),
        ("queue", 2.0, 0.5, "d"),
        ("decode", 2.5, 2.5, "d"),  # 4.0 s of work, of which 2.5 s lie before the answer's end at 5.0 s
    ]
    assert view.e2e_s == 5.0


def test_totals_are_sums() -> None:
    record = RequestRecord("req_1", "chat", 1, arrived_at=0.0)
    record.add_report(report("d"), 0.0, 0)
    totals = record.view().totals
    assert totals.num_bytes == 1500
    assert totals.measured_s == 0.75
    assert totals.ub_s == sum(transfer.ub_s for transfer in record.transfers)
    assert totals.roce_s > totals.ub_s


def test_as_if_scales_the_bytes_to_deepseek_r1() -> None:
    record = RequestRecord("req_1", "chat", 1, arrived_at=0.0)
    assert record.view().as_if is None
    record.add_report(report("d"), 0.0, 0)
    record.kv_bytes_per_token = 500
    as_if = record.view().as_if
    assert as_if is not None
    assert as_if.num_bytes == 3 * 70_272  # 1,500 bytes were three tokens of 500
    assert record.view().totals.ub_s < as_if.ub_s < as_if.roce_s


def test_what_is_unknown_is_null() -> None:
    view = RequestRecord("req_1", "chat", 1, arrived_at=0.0).view()
    assert (view.usage.cached_tokens, view.ttft_s, view.e2e_s, view.totals.measured_s) == (None,) * 4
    assert view.status == "queued"


def test_history_is_bounded_and_keeps_what_runs() -> None:
    history = History(2)
    records = [RequestRecord(f"req_{i}", "chat", 1, 0.0) for i in range(5)]
    for record in records:
        history.begin(record)
    for record in records[:4]:
        history.end(record)
    assert [history.get(r.request_id) is not None for r in records] == [False, False, True, True, True]
    assert [r.request_id for r in history.recent(9)] == ["req_4", "req_3", "req_2"]
    assert [r.request_id for r in history.recent(1)] == ["req_4"]


async def test_a_served_request_is_recorded_whole(gateway: Gateway) -> None:
    raw = await gateway.sdk.completions.with_raw_response.create(
        model=MODEL, prompt=list(range(200, 300)), max_tokens=5
    )
    record = await gateway.record(raw.headers["x-request-id"])
    assert record["status"] == "completed"
    assert record["finish_reason"] == "length"
    assert record["usage"] == {
        "prompt_tokens": 100,
        "completion_tokens": 5,
        "cached_tokens": 96,
        "cache_write_tokens": 0,
    }
    assert (record["route"]["prefill_worker"], record["route"]["decode_worker"]) == ("prefill-0", "decode-0")
    assert record["route"]["attempts"] == 2
    phases = [(entry["phase"], entry["where"]) for entry in record["timeline"]]
    for expected in (("lookup", "gateway"), ("prefill", "prefill-0"), ("decode", "decode-0")):
        assert expected in phases
    assert all(e["start_s"] + e["duration_s"] <= record["e2e_s"] + 1e-9 for e in record["timeline"])
    assert record["totals"]["num_bytes"] == 2 * 100 * 23040


async def test_the_pool_prediction_is_kept(gateway: Gateway) -> None:
    gateway.pool.num_blocks = 2
    raw = await gateway.sdk.completions.with_raw_response.create(
        model=MODEL, prompt=list(range(200, 300)), max_tokens=1
    )
    record = await gateway.record(raw.headers["x-request-id"])
    assert record["route"]["predicted_cached_tokens"] == 64
