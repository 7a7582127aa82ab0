"""Faults that others are known for and that belong to no room in particular; docs/gateway.md lists all of them."""

import asyncio
import contextlib
import random

import openai
from prometheus_client.parser import text_string_to_metric_families

from app.requests.served import ServedModel
from engine.protocol import Failed, Submit
from tests.app.conftest import MODEL, Gateway, disaggregated, serving

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def counters(gateway: Gateway) -> Samples:
    families = text_string_to_metric_families((await gateway.http.get("/metrics")).text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def test_counters_never_go_down_whatever_fails(served: ServedModel) -> None:
    """Cached tokens beyond the prompt, failures, clients that leave: no count of what happened is taken back."""
    draw, refusals = random.Random(3), random.Random(4)

    def refuse(submit: Submit) -> Failed | None:
        # Of its own draws, and often: some are refused twice, however many the time-outs leave to be refused at all.
        if refusals.random() < 0.5:
            return Failed(request_id=submit.request_id, code="internal", message="no blocks")
        return None

    async with serving(served, disaggregated(refuse=refuse, step_s=0.001), failover_s=0.2) as gateway:
        gateway.pool.num_blocks = 5  # of every prompt, also of the shorter ones
        before = await counters(gateway)
        for number in range(40):
            prompt = [draw.randrange(100, 900) for _ in range(draw.choice((3, 33, 64, 200)))]
            timeout = draw.choice((20, 0.02))
            with contextlib.suppress(openai.APIError):
                await gateway.sdk.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=draw.randint(1, 60),
                    timeout=timeout,
                    n=1 + number % 2,
                )
            now = await counters(gateway)
            fallen = {
                sample: (value, now.get(sample))
                for sample, value in before.items()
                if not now.get(sample, -1) >= value
            }
            assert fallen == {}
            before = now
        statuses = {dict(labels)["status"] for name, labels in before if name == "cloudmatrix_requests_total"}
        assert statuses == {"completed", "failed", "cancelled"}, "the test did not do what it says"


async def test_a_workers_error_is_told_once(served: ServedModel) -> None:
    def refuse(submit: Submit) -> Failed:
        return Failed(request_id=submit.request_id, code="too_long", message="the prompt is too long")

    async with serving(served, disaggregated(refuse=refuse), failover_s=0.2) as gateway:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
        for stream in (False, True):
            answer = await gateway.http.post("/v1/completions", json={**body, "stream": stream})
            assert answer.status_code == 400
            assert set(answer.json()) == {"error"}
            message = answer.json()["error"]["message"]
            assert message.count("the prompt is too long") == 1
            assert not set("{}[]\\") & set(message), "an envelope within the envelope"


async def test_a_request_that_a_decode_worker_cannot_take_leaves_it_up(served: ServedModel) -> None:
    """One request is refused; those beside it on the same worker end as if nothing had happened."""

    def refuse(submit: Submit) -> Failed | None:
        is_bad = submit.phase == "decode" and submit.sampling.seed == 13
        return (
            Failed(request_id=submit.request_id, code="internal", message="odd parameters")
            if is_bad
            else None
        )

    async with serving(served, disaggregated(refuse=refuse, step_s=0.001), failover_s=0.2) as gateway:

        async def one(seed: int) -> str | int:
            try:
                answer = await gateway.sdk.completions.create(
                    model=MODEL, prompt=[400], max_tokens=20, seed=seed
                )
            except openai.APIStatusError as error:
                return error.status_code
            return answer.choices[0].text

        answers = await asyncio.gather(*(one(seed) for seed in range(16)))
        assert answers[13] == 500
        assert len(set(answers)) == 2
        assert gateway.workers[1].num_sequences == 0
