"""The answers of the whole service: right, and the same whatever way they took."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.service.prompts import PROMPTS
from tests.service.running import Service, running

MAX_TOKENS = 40
Answer = list[tuple[str, float]]


def ask(client: httpx.Client, question: str, **more: Any) -> dict[str, Any]:
    body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": question}], **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def tokens_of(client: httpx.Client, question: str) -> Answer:
    """Every produced token with its log-probability, to the last bit."""
    answer = ask(client, question, temperature=0, max_tokens=MAX_TOKENS, logprobs=True)
    return [(entry["token"], entry["logprob"]) for entry in answer["choices"][0]["logprobs"]["content"]]


def test_the_capital_of_france(service: Service) -> None:
    with service.client() as client:
        answer = ask(client, PROMPTS[0], temperature=0)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_same_tokens_alone_handed_over_from_the_pool_and_in_a_batch(service: Service, tmp_path: Path) -> None:
    args = ("--prefill", "0", "--decode", "0", "--both", "1", "--no-console")
    with running(tmp_path, *args) as colocated, colocated.client() as client:
        one_worker = [tokens_of(client, prompt) for prompt in PROMPTS]
    with service.client() as client:
        handed_over = [tokens_of(client, prompt) for prompt in PROMPTS]
        from_the_pool = [tokens_of(client, prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(8) as eight:
            in_a_batch = list(eight.map(lambda prompt: tokens_of(client, prompt), PROMPTS))
    assert handed_over == one_worker
    assert from_the_pool == one_worker
    assert in_a_batch == one_worker
    assert sum(map(len, one_worker)) > 20 * len(PROMPTS) / 2, "answers too short to prove anything"


def test_a_prompts_tokens_score_as_when_they_were_made_whatever_is_cached(service: Service) -> None:
    question = "List these in order of size: " + ", ".join(f"number {i}" for i in range(60)) + ". Answer:"

    def score(client: httpx.Client, prompt: str, **more: Any) -> dict[str, Any]:
        body = {"model": "smollm2-135m", "prompt": prompt, "temperature": 0, "logprobs": 2, **more}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    with service.client() as client:
        made = score(client, question, max_tokens=24)["choices"][0]
        cached = score(client, question, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached > 200, "nothing cached: proves nothing"
        echoed = score(client, question + made["text"], max_tokens=0, echo=True)
        both = score(client, question, max_tokens=24, echo=True, n=2)
        salted = score(client, question, max_tokens=0, echo=True, cache_salt="of nobody else")
    whole = echoed["choices"][0]["logprobs"]
    assert echoed["choices"][0]["text"] == question + made["text"]
    assert echoed["usage"]["completion_tokens"] == 0
    assert echoed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    # To the last bit: made one by one in decode, and read all at once.
    num_made = len(made["logprobs"]["tokens"])
    assert num_made > 8
    assert whole["token_logprobs"][-num_made:] == made["logprobs"]["token_logprobs"]
    assert whole["top_logprobs"][-num_made:] == made["logprobs"]["top_logprobs"]
    assert [choice["logprobs"] for choice in both["choices"]] == [whole, whole]
    alone = salted["choices"][0]["logprobs"]
    assert alone["token_logprobs"] == whole["token_logprobs"][:-num_made]


def test_a_second_call_is_served_from_the_cache(service: Service) -> None:
    question = "Tell me a fact about each of these animals. " + ", ".join(
        f"animal number {i}" for i in range(60)
    )
    with service.client() as client:
        first = ask(client, question, temperature=0, max_tokens=8)
        second = ask(client, question, temperature=0, max_tokens=8)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 64  # the template's own tokens at most
    # All whole blocks of 32 but for the last token, which is always computed.
    whole = (second["usage"]["prompt_tokens"] - 1) // 32 * 32
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= whole
    assert first["choices"] == second["choices"]


def test_a_salt_narrows_who_finds_the_cache(service: Service) -> None:
    question = "What do these numbers have in common? " + ", ".join(str(i * i) for i in range(60))
    with service.client() as client:

        def cached(**salt: str) -> int:
            usage = ask(client, question, temperature=0, max_tokens=2, **salt)["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached(cache_salt="mine") == 0
        assert cached(cache_salt="mine") >= 64
        assert cached(cache_salt="other") == 0


@pytest.fixture
def sdk(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=service.url + "/v1", api_key="unused", max_retries=0)


def test_openai_package_whole_and_streamed_agree(sdk: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPTS[9]}]
    whole = sdk.chat.completions.create(
        model="smollm2-135m", messages=messages, temperature=0.8, seed=11, max_tokens=32
    )
    stream = sdk.chat.completions.create(
        model="smollm2-135m",
        messages=messages,
        temperature=0.8,
        seed=11,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_a_seed_fixes_the_text_and_another_changes_it(sdk: openai.OpenAI) -> None:
    def say(seed: int) -> str:
        answer = sdk.completions.create(
            model="smollm2-135m", prompt="Once upon a time", temperature=1, seed=seed, max_tokens=24
        )
        return answer.choices[0].text

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_choices_of_one_request_differ_and_repeat(sdk: openai.OpenAI) -> None:
    def say() -> list[str]:
        answer = sdk.completions.create(
            model="smollm2-135m", prompt="My favourite colour is", temperature=1, seed=5, max_tokens=12, n=3
        )
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = say()
    assert len(set(first)) > 1
    assert say() == first
