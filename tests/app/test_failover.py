"""Workers that die, decline or are missing, and clients that leave: nothing is lost, repeated or held."""

import asyncio
import time
from typing import Any

import openai
import pytest

from engine.protocol import Failed, Submit
from tests.app.conftest import MODEL, Gateway, disaggregated, serving
from tests.app.echo_worker import EchoWorker

PROMPT = list(range(300, 340))


async def eventually(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 10 s"
        await asyncio.sleep(0.005)


async def complete(gateway: Gateway, **more: Any) -> Any:
    return await gateway.sdk.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, **{"max_tokens": 10, **more}
    )


def expected(served: Any, num_tokens: int) -> str:
    text: str = served.text.tokenizer.decode((PROMPT * (num_tokens // len(PROMPT) + 1))[:num_tokens])
    return text


async def test_a_stream_survives_its_decode_worker(served: Any) -> None:
    decoders = [EchoWorker(f"decode-{i}", "decode", step_s=0.005) for i in range(2)]
    async with serving(served, [EchoWorker("prefill-0", "prefill"), *decoders]) as gateway:
        stream = await gateway.sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100, stream=True)
        text, reason = "", None
        async for chunk in stream:
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason
            if len(text) > 20 and len(decoders[0].submits) == 1 and not decoders[1].submits:
                await decoders[0].die()
        assert reason == "length"
        assert text == expected(served, 100)
        again = decoders[1].submits[0]
        assert 1 < len(again.generated_tokens) < 100
        assert again.handoff == decoders[0].submits[0].handoff


async def test_a_prefill_worker_that_dies_is_replaced_before_the_first_byte(served: Any) -> None:
    prefillers = [EchoWorker(f"prefill-{i}", "prefill") for i in range(2)]
    async with serving(served, [*prefillers, EchoWorker("decode-0", "decode")]) as gateway:
        prefillers[0].is_held = True
        task = asyncio.create_task(complete(gateway))
        await eventually(lambda: prefillers[0].submits)
        await prefillers[0].die()
        answer = (await task).parse()
        assert answer.choices[0].text == expected(served, 10)
        assert len(prefillers[1].submits) == 1


async def test_the_only_decode_worker_comes_back(served: Any) -> None:
    workers = disaggregated(step_s=0.003)
    async with serving(served, workers) as gateway:
        stream = await gateway.sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=60, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if len(workers[1].submits) == 1 and workers[1].num_sequences and len(text) > 10:
                await workers[1].die()
        assert text == expected(served, 60)
        assert sum(len(worker.submits) for worker in workers) == 3


async def test_a_worker_that_declines_is_passed_over(served: Any) -> None:
    def full(submit: Submit) -> Failed:
        return Failed(request_id=submit.request_id, code="overloaded", message="full")

    workers = [
        EchoWorker("prefill-0", "prefill", refuse=full),
        EchoWorker("prefill-1", "prefill"),
        EchoWorker("decode-0", "decode"),
    ]
    async with serving(served, workers) as gateway:
        raw = await complete(gateway)
        assert raw.parse().choices[0].text == expected(served, 10)
        record = await gateway.record(raw.headers["x-request-id"])
        assert record["route"]["prefill_worker"] == "prefill-1"
        assert record["route"]["reason"]["excluded"] == {"prefill-0": "failed this request before"}


@pytest.mark.parametrize(
    ("code", "error", "status"),
    [
        ("overloaded", openai.RateLimitError, 429),
        ("draining", openai.InternalServerError, 503),
        ("internal", openai.InternalServerError, 500),
        ("too_long", openai.BadRequestError, 400),
        ("expired", openai.InternalServerError, 504),
    ],
)
async def test_when_every_worker_declines_the_client_hears_why(
    served: Any, code: Any, error: type[openai.APIStatusError], status: int
) -> None:
    def refuse(submit: Submit) -> Failed:
        return Failed(request_id=submit.request_id, code=code, message="no")

    async with serving(served, disaggregated(refuse=refuse), failover_s=0.3) as gateway:
        for stream in (False, True):
            with pytest.raises(error) as caught:
                await complete(gateway, stream=stream)
            assert caught.value.status_code == status
        assert gateway.app is not None
        assert (await gateway.http.get("/metrics")).text.count("cloudmatrix_requests_in_flight 0.0") == 1


async def test_a_failure_in_the_middle_is_an_error_event(served: Any) -> None:
    workers = disaggregated(step_s=0.003)
    async with serving(served, workers, failover_s=0.2) as gateway:
        stream = await gateway.sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=4000, stream=True
        )
        for _ in range(5):
            await anext(stream)
        gateway.directory.workers.clear()
        for worker in workers:
            await worker.die()
        with pytest.raises(openai.APIError, match="no worker can serve") as caught:
            _ = [chunk async for chunk in stream]
        assert not isinstance(caught.value, openai.APIStatusError)


@pytest.mark.parametrize("role", ["both", "decode", "prefill"])
async def test_one_worker_alone_does_everything(served: Any, role: Any) -> None:
    async with serving(served, [EchoWorker("solo", role)], ready=role == "both") as gateway:
        await eventually(lambda: gateway.workers[0]._connections)
        raw = await complete(gateway, n=2)
        assert [choice.text for choice in raw.parse().choices] == [expected(served, 10)] * 2
        record = await gateway.record(raw.headers["x-request-id"])
        mode = {"both": "aggregated", "decode": "decode_worker_alone", "prefill": "prefill_worker_alone"}[
            role
        ]
        assert record["route"]["reason"]["mode"] == mode
        assert record["usage"]["cached_tokens"] == 32


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_workers(served: Any, stream: bool) -> None:
    workers = disaggregated(step_s=0.002)
    async with serving(served, workers) as gateway:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5000, "stream": stream}
        reader = asyncio.create_task(gateway.http.post("/v1/completions", json=body))
        await eventually(lambda: workers[1].num_sequences == 1)
        reader.cancel()
        await eventually(lambda: workers[1].num_sequences == 0)
        assert workers[1].cancels == [workers[1].submits[0].request_id]
        listed = (await gateway.http.get("/api/requests?limit=1")).json()["requests"]
        assert listed[0]["status"] == "cancelled"


async def test_a_client_that_leaves_during_prefill(served: Any) -> None:
    workers = disaggregated()
    async with serving(served, workers) as gateway:
        workers[0].is_held = True
        reader = asyncio.create_task(complete(gateway))
        await eventually(lambda: workers[0].submits)
        reader.cancel()
        await eventually(lambda: workers[0].cancels)
        assert not workers[1].submits


async def test_an_unreadable_directory_changes_nothing(gateway: Gateway) -> None:
    gateway.directory.is_broken = True
    assert (await complete(gateway)).parse().choices[0].finish_reason == "length"


async def test_a_draining_worker_gets_nothing_new(served: Any) -> None:
    workers = [EchoWorker("both-0", "both"), EchoWorker("both-1", "both")]
    async with serving(served, workers) as gateway:
        workers[0].state = "draining"
        await asyncio.sleep(0.1)  # five polls of the directory
        for _ in range(3):
            await complete(gateway)
        assert not workers[0].submits
        assert len(workers[1].submits) == 3


async def test_keep_alives_cover_a_slow_start(served: Any) -> None:
    workers = disaggregated()
    async with serving(served, workers, keep_alive_s=0.2) as gateway:
        workers[0].is_held = True
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "stream": True}
        async with gateway.http.stream("POST", "/v1/completions", json=body) as answer:
            pieces = answer.aiter_bytes()
            assert await anext(pieces) == b": keep-alive\n\n"
            workers[0].is_held = False
            rest = b"".join([piece async for piece in pieces])
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_the_callers_own_limit_goes_to_the_worker(served: Any) -> None:
    async with serving(served, disaggregated()) as gateway:
        await complete(gateway, timeout=30.0)
        await complete(gateway, extra_headers={"x-request-timeout": "5"})
        first, second = (submit.expires_in_s for submit in gateway.workers[0].submits)
        assert first is not None
        assert second is not None
        assert 29 < first <= 30
        assert 4 < second <= 5


async def test_shutting_down_lets_answers_end(served: Any) -> None:
    workers = disaggregated(step_s=0.005)
    async with serving(served, workers) as gateway:
        stream = await gateway.sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=60, stream=True)
        chunks = [await anext(stream)]
        gateway.server.should_exit = True
        chunks += [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected(served, 60)


async def test_nobody_waits_longer_than_the_caller(served: Any) -> None:
    def full(submit: Submit) -> Failed:
        return Failed(request_id=submit.request_id, code="overloaded", message="full")

    async with serving(served, disaggregated(refuse=full), failover_s=30) as gateway:
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as caught:
            await complete(gateway, extra_headers={"x-request-timeout": "0.3"})
        assert caught.value.status_code == 504
        assert caught.value.code == "deadline_exceeded"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert 0.3 <= time.monotonic() - began < 5
