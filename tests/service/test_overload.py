"""More than can be served, sent by the unmodified `openai` package: refusals are clean, its own retries come when they
were told to, nothing is lost."""

import asyncio
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.running import running

MODEL = "smollm2-135m"
NUM_REQUESTS = 120
HELD = ("cloudmatrix_requests_in_flight", "cloudmatrix_requests_queued", "cloudmatrix_sequences_released")


class Attempts:
    """What httpx saw of each of a client's requests: when an attempt was sent, its status, the wait that was asked."""

    def __init__(self) -> None:
        self.sent_at: defaultdict[str, list[float]] = defaultdict(list)
        self.answers: defaultdict[str, list[tuple[float, int, str | None]]] = defaultdict(list)

    async def sent(self, request: httpx.Request) -> None:
        self.sent_at[request.headers["x-number"]].append(time.monotonic())

    async def answered(self, response: httpx.Response) -> None:
        wait = response.headers.get("retry-after-ms")
        self.answers[response.request.headers["x-number"]].append(
            (time.monotonic(), response.status_code, wait)
        )


def held(url: str) -> dict[str, float]:
    """What the gateway says is under way or waiting."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {name: sum(s.value for s in samples if s.name == name) for name in HELD}


@pytest.mark.slow
async def test_the_sdk_comes_back_when_told_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDMATRIX_TTFT_TARGET_S", "1.0")
    attempts = Attempts()
    with running(tmp_path / "data", "--no-console") as service:
        http = openai.DefaultAsyncHttpxClient(
            trust_env=False, event_hooks={"request": [attempts.sent], "response": [attempts.answered]}
        )
        async with openai.AsyncOpenAI(
            base_url=service.url + "/v1", api_key="none", http_client=http, max_retries=40
        ) as sdk:

            async def ask(number: int) -> tuple[str | None, int]:
                answer = await sdk.completions.create(
                    model=MODEL,
                    prompt=[500 + number] * 100,
                    max_tokens=16,
                    extra_headers={"x-number": str(number)},
                    extra_body={"ignore_eos": True},
                )
                assert answer.usage is not None
                return answer.choices[0].finish_reason, answer.usage.completion_tokens

            # All at once: many times what the workers can begin within the target of one second.
            replies = await asyncio.gather(*(ask(number) for number in range(NUM_REQUESTS)))
        assert replies == [("length", 16)] * NUM_REQUESTS
        async with asyncio.timeout(10):
            while any(held(service.url).values()):
                await asyncio.sleep(0.05)

    statuses = Counter(status for answers in attempts.answers.values() for _, status, _ in answers)
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200] == NUM_REQUESTS
    # Nothing is known of a service's speed at first: what it let in and could not begin in time is dropped with 503.
    assert statuses[503] > 0
    for number, answers in attempts.answers.items():
        for (answered_at, _, wait), again_at in zip(answers, attempts.sent_at[number][1:], strict=False):
            assert wait is not None
            assert again_at - answered_at >= int(wait) / 1000 > 0
