"""What `GET /api/requests/{id}` says of a request adds up."""

from itertools import pairwise
from typing import Any

from tests.service.running import Service

KV_BYTES_PER_TOKEN = 12_240  # 30 layers x 2 (K, V) x 3 KV heads x (64 bytes + a float)
BLOCK_TOKENS = 32
BLOCK_BYTES = BLOCK_TOKENS * KV_BYTES_PER_TOKEN
PHASES = ["queue", "lookup", "prefill", "publish", "fetch", "decode"]


def record_of_a_fresh_request(service: Service, *, unique: str) -> dict[str, Any]:
    question = f"Conversation {unique}. " + " ".join(f"Point {i} about {unique}." for i in range(40))
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
    }
    with service.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": "smollm2-135m", **body})
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = client.get(f"/api/requests/{answer.headers['x-request-id']}").json()
    assert record["usage"]["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    return record


def moved(record: dict[str, Any], *kinds: str) -> int:
    return sum(transfer["num_bytes"] for transfer in record["transfers"] if transfer["kind"] in kinds)


def test_bytes_moved_are_the_tokens_kv(service: Service) -> None:
    record = record_of_a_fresh_request(service, unique="bytes")
    prompt_tokens = record["usage"]["prompt_tokens"]
    least = prompt_tokens * KV_BYTES_PER_TOKEN
    # Whole blocks travel; a tail of t tokens costs at most one block more. The prompt goes out of the prefill worker
    # once and into the decode worker once.
    fetched = moved(record, "fetch", "fetch_tail")
    assert least <= fetched <= least + BLOCK_BYTES + prompt_tokens * 64
    published = moved(record, "publish", "publish_tail")
    decoded = record["usage"]["completion_tokens"] * KV_BYTES_PER_TOKEN
    assert least - 2 * BLOCK_BYTES <= published <= least + decoded + 2 * BLOCK_BYTES + prompt_tokens * 64


def test_a_record_says_what_was_promised_found_written_and_why_not_more(service: Service) -> None:
    first = record_of_a_fresh_request(service, unique="reuse")
    again = record_of_a_fresh_request(service, unique="reuse")
    whole = first["usage"]["prompt_tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
    template = first["usage"][
        "cached_tokens"
    ]  # blocks that another test's prompt shares, at most the template's
    assert first["usage"]["cache_write_tokens"] == whole - template
    prefill = first["reuse"][0]
    assert (prefill["where"], prefill["miss_reason"]) == ("prefill-0", "never_seen")
    decode = first["reuse"][1]
    assert decode["where"] == "decode-0"
    assert decode["found_blocks"] == decode["chosen_blocks"] == decode["fetched_blocks"]
    assert again["usage"]["cache_write_tokens"] == 0
    assert again["usage"]["cached_tokens"] >= whole - BLOCK_TOKENS
    assert again["route"]["predicted_cached_tokens"] == min(whole, again["usage"]["prompt_tokens"] - 1)
    with service.client() as client:
        metrics = client.get("/metrics").text
    assert 'cloudmatrix_pool_misses_total{model_name="smollm2-135m",reason="never_seen"}' in metrics


def test_totals_are_the_sum_of_the_transfers_and_ub_beats_roce(service: Service) -> None:
    record = record_of_a_fresh_request(service, unique="totals")
    assert record["transfers"]
    for field in ("num_bytes", "measured_s", "ub_s", "roce_s"):
        total = sum(transfer[field] for transfer in record["transfers"])
        assert abs(record["totals"][field] - total) <= 1e-9 * max(1, total)
    for transfer in record["transfers"]:
        assert 0 < transfer["ub_s"] < transfer["roce_s"]
        assert transfer["measured_s"] > 0


def test_phases_are_in_order_and_within_the_request(service: Service) -> None:
    record = record_of_a_fresh_request(service, unique="phases")
    spans = {
        phase: [
            (entry["start_s"], entry["start_s"] + entry["duration_s"])
            for entry in record["timeline"]
            if entry["phase"] == phase
        ]
        for phase in PHASES
    }
    assert all(spans.values()), f"a phase is missing: {spans}"
    for entry in record["timeline"]:
        assert entry["start_s"] >= 0
        assert entry["duration_s"] >= 0
        assert entry["start_s"] + entry["duration_s"] <= record["e2e_s"] + 1e-6
    # Compute phases of one request never overlap: what is prefilled is prefilled before it is decoded.
    computing = sorted(span for phase in ("prefill", "decode") for span in spans[phase])
    assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(computing))


def test_two_workers_and_the_reason_are_named(service: Service) -> None:
    record = record_of_a_fresh_request(service, unique="route")
    assert record["route"]["prefill_worker"] == "prefill-0"
    assert record["route"]["decode_worker"] == "decode-0"
    assert record["route"]["reason"]
    assert record["status"] == "completed"
    assert record["finish_reason"] == "length"
