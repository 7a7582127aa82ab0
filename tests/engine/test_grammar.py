"""Grammar-constrained decoding on the fake model, whose logits are noise: only the masks make sense of it."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from engine.grammar import MAX_GRAMMAR_BYTES, GrammarError, check_grammar
from engine.protocol import Failed, Finished, Prefilled, Tokens
from engine.speculation import Drafter
from memory_pool.store import MemoryStore
from tests.engine.fakes import GRAMMARS, LETTERS, Bench

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yz"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
    "additionalProperties": False,
}
PROMPT = list(range(10, 31))


def grammar_of(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def text(tokens: list[int]) -> str:
    return b"".join(LETTERS[token] for token in tokens).decode()


def sampling(**more: Any) -> dict[str, Any]:
    return {"max_tokens": 60, "temperature": 1.0, "grammar": grammar_of(SCHEMA), **more}


def answer(bench: Bench, request_id: str, **fields: Any) -> list[int]:
    bench.submit(request_id, PROMPT, **fields)
    bench.finish(request_id)
    return bench.tokens(request_id)


def test_noise_becomes_what_the_schema_says() -> None:
    bench = Bench()
    for seed in range(20):
        tokens = answer(bench, f"r{seed}", sampling=sampling(seed=seed))
        value = json.loads(text(tokens))
        assert value["a"] in ("x", "yz")
        assert 0 <= value["n"] <= 99
        last = bench.last(f"r{seed}")
        assert isinstance(last, Finished)
        assert last.finish_reason == "stop"
    bench.check_books()
    bench.close()


def test_a_batch_a_draft_and_a_handoff_change_nothing() -> None:
    alone, crowd = Bench(), Bench(drafter=Drafter())
    expected = {seed: answer(alone, f"r{seed}", sampling=sampling(seed=seed)) for seed in range(6)}
    for seed in expected:
        crowd.submit(f"r{seed}", PROMPT, sampling=sampling(seed=seed))
    crowd.submit("free", PROMPT, sampling={"max_tokens": 20, "temperature": 1.0})
    crowd.finish(*(f"r{seed}" for seed in expected), "free")
    assert {seed: crowd.tokens(f"r{seed}") for seed in expected} == expected
    store = MemoryStore()
    prefill, decode = Bench(store=store), Bench(store=store, worker_id="d")
    prefill.submit("r3", PROMPT, phase="prefill", sampling=sampling(seed=3))
    prefill.finish("r3")
    assert isinstance(prefill.last("r3"), Prefilled)
    begun = prefill.tokens("r3")
    fields = {"generated_tokens": begun, "handoff": prefill.names("r3"), "sampling": sampling(seed=3)}
    assert begun + answer(decode, "r3", phase="decode", **fields) == expected[3]
    # A failover: another worker goes on in the middle, without any KV.
    part = expected[3][:5]
    assert (
        part + answer(alone, "again", phase="decode", generated_tokens=part, sampling=sampling(seed=3))
        == expected[3]
    )
    for bench in (alone, crowd, prefill, decode):
        bench.close()


def test_drafts_are_cut_to_what_the_grammar_takes() -> None:
    matcher = GRAMMARS.compile(grammar_of(SCHEMA))
    fitting = [LETTERS.index(token) for token in (b'{"', b"a", b'"', b":", b'"')]
    assert matcher.allowed_part([*fitting, LETTERS.index(b"q")]) == len(fitting)
    assert matcher.allowed_part([LETTERS.index(b"q")]) == 0


def test_max_tokens_cuts_and_says_length() -> None:
    bench = Bench()
    tokens = answer(bench, "r", sampling=sampling(max_tokens=4, seed=1))
    last = bench.last("r")
    assert isinstance(last, Finished)
    assert (len(tokens), last.finish_reason) == (4, "length")
    bench.close()


def test_a_grammar_without_a_way_on_fails_its_request_alone() -> None:
    # The fake's vocabulary has no capital letters, so nothing can spell this.
    bench = Bench()
    bench.submit("bad", PROMPT, sampling=sampling(grammar=LLMatcher.grammar_from_regex("[A-Z]+")))
    bench.submit("good", PROMPT, sampling=sampling())
    bench.finish("bad", "good")
    failed = bench.last("bad")
    assert isinstance(failed, Failed)
    assert failed.code == "invalid"
    assert isinstance(bench.last("good"), Finished)
    assert not any(isinstance(event, Tokens) for event in bench.events["bad"])
    bench.check_books()
    bench.close()


def test_unsupported_and_huge_grammars_are_refused() -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        check_grammar(grammar_of({"type": "array", "uniqueItems": True}))
    with pytest.raises(GrammarError, match="longer than"):
        check_grammar(grammar_of({"enum": ["x" * MAX_GRAMMAR_BYTES]}))
    with pytest.raises(GrammarError, match="uniqueItems"):
        GRAMMARS.compile(grammar_of({"type": "array", "uniqueItems": True}))


def test_logprobs_are_of_the_unmasked_distribution() -> None:
    bench = Bench()
    bench.submit("r", PROMPT, sampling=sampling(logprobs=2, seed=5))
    bench.finish("r")
    first = next(event for event in bench.events["r"] if isinstance(event, Tokens))
    assert first.logprobs is not None
    # The grammar takes `{` or `{"` only; over all 64 tokens each has a share far from 1.
    assert first.token_ids[0] in (LETTERS.index(b"{"), LETTERS.index(b'{"'))
    assert first.logprobs[0].logprob < -0.5
    assert len(first.logprobs[0].top) == 2
    bench.close()
