"""The unmodified `openai` package against a running gateway; echo workers answer with the prompt's own tokens."""

import asyncio
from typing import Any

import openai
import pytest

from app.requests.served import ServedModel
from tests.app.conftest import MODEL, Gateway, serving
from tests.app.echo_worker import EchoWorker

ALPHABET = "a b c d e f g h"


async def test_chat_whole_and_streamed_say_the_same(gateway: Gateway) -> None:
    messages: Any = [{"role": "user", "content": "Say something"}]
    whole = await gateway.sdk.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=12, extra_body={"ignore_eos": True}
    )
    stream = await gateway.sdk.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=12,
        extra_body={"ignore_eos": True},
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == "system\nYou are a helpful AI assistant named Smol"
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert whole.choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12


async def test_completion_goes_through_prefill_and_decode(gateway: Gateway) -> None:
    answer = await gateway.sdk.completions.create(model=MODEL, prompt=ALPHABET, max_tokens=6)
    assert answer.choices[0].text == "a b c d e f"
    prefill, decode = gateway.workers
    assert [submit.phase for submit in prefill.submits] == ["prefill"]
    assert [submit.phase for submit in decode.submits] == ["decode"]
    handoff = decode.submits[0].handoff
    assert handoff is not None
    assert handoff.num_tokens == answer.usage.prompt_tokens  # type: ignore[union-attr]  # asserted by use
    assert len(decode.submits[0].generated_tokens) == 1


async def test_blocks_are_prefetched_with_their_tokens(gateway: Gateway) -> None:
    prompt = list(range(100, 170))  # 70 tokens: two whole blocks of 32 and a tail
    await gateway.sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    (prefetch,) = gateway.workers[1].prefetches
    assert len(prefetch.block_keys) == 2
    assert prefetch.tokens == prompt[:64]
    assert prefetch.request_id == gateway.workers[1].submits[0].request_id


async def test_token_prompts_and_lists_answer_in_order(gateway: Gateway) -> None:
    answer = await gateway.sdk.completions.create(
        model=MODEL, prompt=[[80, 81, 82], [90, 91, 92]], max_tokens=1, n=2, logprobs=1
    )
    tokens = [choice.logprobs.token_logprobs for choice in answer.choices]  # type: ignore[union-attr]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    assert tokens == [[-0.5]] * 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 4)


async def test_n_prefills_once_and_derives_seeds(gateway: Gateway) -> None:
    answer = await gateway.sdk.completions.create(model=MODEL, prompt=ALPHABET, n=3, seed=7, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["a b c d"] * 3
    prefill, decode = gateway.workers
    assert len(prefill.submits) == 1
    assert prefill.submits[0].sampling.seed == 7
    seeds = [submit.sampling.seed for submit in decode.submits]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    # The others sample their first token themselves, from the KV of the one prefill.
    assert [len(submit.generated_tokens) for submit in decode.submits] == [1, 0, 0]
    assert all(submit.handoff == decode.submits[0].handoff for submit in decode.submits)


async def test_max_tokens_one_never_reaches_decode(gateway: Gateway) -> None:
    answer = await gateway.sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_completion_tokens=1, n=2
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_never_shows_and_frees_the_worker(gateway: Gateway, stream: bool) -> None:
    # The stop string spans tokens: " c" and " d e".
    prompt: Any = {"model": MODEL, "prompt": ALPHABET, "max_tokens": 5000, "stop": ["c d e", "zzz"]}
    if stream:
        chunks = [chunk async for chunk in await gateway.sdk.completions.create(**prompt, stream=True)]
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = await gateway.sdk.completions.create(**prompt)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == "a b "
    assert reason == "stop"
    assert gateway.workers[1].num_sequences == 0 or gateway.workers[1].cancels


async def test_a_stop_token_ends_the_answer_without_showing(gateway: Gateway) -> None:
    # The chat template closes the system turn with the end-of-turn token, which the echo reaches at token 21.
    answer = await gateway.sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert (
        choice.message.content
        == "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens - 1  # type: ignore[union-attr]
    assert len(choice.logprobs.content[0].top_logprobs) == 2


async def test_sampling_reaches_the_worker(gateway: Gateway) -> None:
    await gateway.sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "x"}],
        temperature=0.5,
        top_p=0.25,
        seed=-3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        max_tokens=2,
        extra_body={"top_k": 9, "min_p": 0.125, "repetition_penalty": 1.5, "stop_token_ids": [77]},
    )
    sampling = gateway.workers[0].submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 9, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        0.5,
        -0.5,
        1.5,
    )
    assert sampling.logit_bias == {5: -100.0}
    assert sampling.stop_token_ids[-1] == 77
    assert len(sampling.stop_token_ids) > 1, "the model's own end tokens stay in force"
    assert sampling.seed == 2**63 - 3
    assert sampling.max_tokens == 2


async def test_text_parts_and_roles(gateway: Gateway) -> None:
    parts: Any = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    joined: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "one two"}]
    split: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}]
    for messages in (joined, split):
        await gateway.sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    first, second = gateway.workers[0].submits
    assert first.prompt_tokens == second.prompt_tokens


async def test_models_are_listed_with_their_context(gateway: Gateway) -> None:
    models = (await gateway.sdk.models.list()).data
    assert [model.id for model in models] == [MODEL]
    assert models[0].max_model_len == 8192  # type: ignore[attr-defined]  # an extension that vLLM has too
    assert (await gateway.sdk.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await gateway.sdk.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


async def test_two_hundred_streams_at_once(served: ServedModel) -> None:
    workers = [EchoWorker("prefill-0", "prefill"), EchoWorker("decode-0", "decode", step_s=0.002)]
    async with serving(served, workers) as gateway:

        async def one(number: int) -> str:
            stream = await gateway.sdk.completions.create(
                model=MODEL, prompt=[100 + number, 400, 401], max_tokens=20, stream=True
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
            return "".join(chunk.choices[0].text for chunk in chunks)

        texts = await asyncio.gather(*(one(number) for number in range(200)))
        tokenizer = served.text.tokenizer
        for number, text in enumerate(texts):
            assert text == tokenizer.decode(([100 + number, 400, 401] * 7)[:20])
        assert all(worker.num_sequences == 0 for worker in workers)
