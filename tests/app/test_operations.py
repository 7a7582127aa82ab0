"""What operators and Prometheus see, and the small endpoints beside the OpenAI ones."""

import time

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.requests.served import ServedModel
from tests.app.conftest import MODEL, Gateway, disaggregated, serving


async def samples(gateway: Gateway) -> dict[str, float]:
    text = (await gateway.http.get("/metrics")).text
    return {
        sample.name
        + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_what_was_served(gateway: Gateway) -> None:
    raw = await gateway.sdk.completions.with_raw_response.create(
        model=MODEL, prompt=list(range(200, 300)), max_tokens=5
    )
    await gateway.record(raw.headers["x-request-id"])  # waits until the workers have reported
    now = await samples(gateway)
    assert now["vllm:prompt_tokens_total"] == 100
    assert now["vllm:generation_tokens_total"] == 5
    assert now["vllm:prompt_tokens_cached_total"] == 96
    assert now["vllm:request_success_total|finished_reason=length"] == 1
    assert now["vllm:time_to_first_token_seconds_count"] == 1
    assert now["vllm:inter_token_latency_seconds_count"] == 4
    assert now["vllm:inter_token_latency_seconds_bucket|le=+Inf"] == 4
    assert now["vllm:request_time_per_output_token_seconds_count"] == 1
    assert now["vllm:e2e_request_latency_seconds_count"] == 1
    assert now["vllm:request_prefill_time_seconds_count"] == 1
    assert now["cloudmatrix_requests_total|status=completed"] == 1
    assert now["cloudmatrix_http_requests_total|endpoint=/v1/completions|status=200"] == 1
    assert now["cloudmatrix_request_transfer_bytes_total|kind=fetch"] == 100 * 23040
    ub, roce = (now[f"cloudmatrix_request_transfer_modelled_seconds_total|plane={p}"] for p in ("ub", "roce"))
    assert 0 < ub < roce
    assert now["cloudmatrix_worker_routable|engine=decode-0|role=decode"] == 1
    assert now["cloudmatrix_requests_in_flight"] == 0


async def test_late_reports_delay_no_answer_and_are_counted_all_the_same(served: ServedModel) -> None:
    async with serving(served, disaggregated(report_delay_s=0.4)) as gateway:
        began = time.monotonic()
        raw = await gateway.sdk.completions.with_raw_response.create(
            model=MODEL, prompt=list(range(200, 300)), max_tokens=5
        )
        assert time.monotonic() - began < 0.4
        record = await gateway.record(raw.headers["x-request-id"])
        assert [transfer["kind"] for transfer in record["transfers"]] == ["publish", "fetch"]
        now = await samples(gateway)
        assert now["cloudmatrix_request_transfer_bytes_total|kind=fetch"] == 100 * 23040
        assert now["cloudmatrix_requests_total|status=completed"] == 1


async def test_workers_are_listed(gateway: Gateway) -> None:
    workers = (await gateway.http.get("/api/workers")).json()["workers"]
    assert [worker["id"] for worker in workers] == ["decode-0", "prefill-0"]
    for field in ("role", "state", "model", "pid", "running", "waiting", "kv_blocks_used", "kv_blocks_total"):
        assert field in workers[0]
    assert workers[0]["location"] == {"node": 12, "npu": 0, "die": 0}
    assert workers[0]["connected"] is True
    assert (await gateway.http.get("/api/workers/prefill-0")).json()["id"] == "prefill-0"
    assert (await gateway.http.get("/api/pool")).json() == {"blocks": 0}


async def test_a_worker_that_does_not_answer_http_is_503(gateway: Gateway) -> None:
    # Echo workers speak only the link, so HTTP to them fails in the handshake.
    answer = await gateway.http.post("/api/workers/prefill-0/drain")
    assert answer.status_code in (409, 503)
    assert answer.json()["error"]["message"].startswith("worker prefill-0")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "Hello, world"}, "Hello, world"),
        ({"messages": [{"role": "user", "content": "Hi"}], "model": MODEL}, None),
    ],
)
async def test_tokenize_and_back(gateway: Gateway, body: dict[str, object], text: str | None) -> None:
    answer = (await gateway.http.post("/tokenize", json={**body, "return_token_strs": True})).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 8192
    back = (await gateway.http.post("/detokenize", json={"tokens": answer["tokens"]})).json()["prompt"]
    assert back == "".join(answer["token_strs"])
    if text is None:
        assert "<|im_start|>user\nHi<|im_end|>" in back
    else:
        assert back == text


async def test_tokenize_refuses_by_name(gateway: Gateway) -> None:
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/detokenize", {"tokens": [10**8]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ):
        answer = await gateway.http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_the_openapi_document_shows_the_bodies_that_are_decoded(gateway: Gateway) -> None:
    document = msgspec.json.decode((await gateway.http.get("/openapi.json")).content)
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert schema["required"] == ["model", "messages"]
    assert schema["properties"]["n"]["anyOf"][0]["minimum"] == 1
