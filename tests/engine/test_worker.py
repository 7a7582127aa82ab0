"""The worker's loop over a model that reads its whole history back from the KV cache: every token proves the blocks."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.model import StepBatch
from engine.protocol import BlocksPublished, Failed, Finished, Prefetch, Prefilled, PromptScored, Tokens
from memory_pool.keys import block_keys
from memory_pool.store import MemoryStore
from tests.engine.fakes import BLOCK_TOKENS, FINGERPRINT, FORMAT, Bench, FaultyStore, expected, row_logits

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench() -> Iterator[MakeBench]:
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + i * 7) % 61 for i in range(length)]


def hand_over(source: Bench, target: Bench, tokens: list[int], max_tokens: int = 8) -> list[int]:
    """Prefill on one worker, decode on the other; the tokens of both."""
    source.submit("r", tokens, phase="prefill", sampling={"max_tokens": max_tokens})
    source.finish("r")
    first = source.tokens("r")
    target.submit(
        "r",
        tokens,
        phase="decode",
        generated_tokens=first,
        handoff=source.names("r"),
        sampling={"max_tokens": max_tokens},
    )
    target.finish("r")
    return first + target.tokens("r")


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 33, 100])
def test_one_request_gets_the_tokens_of_the_model(make_bench: MakeBench, length: int) -> None:
    bench = make_bench()
    bench.submit("a", prompt(length))
    bench.finish("a")
    assert bench.tokens("a") == expected(prompt(length), 8)
    last = bench.last("a")
    assert isinstance(last, Finished)
    assert last.finish_reason == "length"
    assert last.report.computed_tokens == length
    bench.check_books()


def test_many_together_get_what_each_gets_alone(make_bench: MakeBench) -> None:
    bench = make_bench()
    prompts = {f"r{i}": prompt(3 + 5 * i, start=i) for i in range(8)}
    for name, tokens in prompts.items():
        bench.submit(name, tokens)
    bench.finish(*prompts)
    for name, tokens in prompts.items():
        assert bench.tokens(name) == expected(tokens, 8), name
    bench.check_books()


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 31])
def test_handed_over_tokens_equal_those_of_one_worker(make_bench: MakeBench, length: int) -> None:
    store = MemoryStore()
    prefill, decode = make_bench(store=store), make_bench(store=store)
    assert hand_over(prefill, decode, prompt(length)) == expected(prompt(length), 8)
    assert decode.report("r").computed_tokens == 0
    assert decode.report("r").cached_tokens == length
    kinds = {t.kind for t in prefill.report("r").transfers}
    assert kinds == {k for k, has in (("publish", length >= 4), ("publish_tail", length % 4)) if has}
    # Every block goes out once and comes in once: ceil(length / 4) blocks of 32 B and a header each time.
    blocks = -(-length // BLOCK_TOKENS)
    for report in (prefill.report("r"), decode.report("r")):
        moved = [t for t in report.transfers if not (t.kind == "publish" and report is decode.report("r"))]
        assert len(moved) == blocks
        assert sum(t.num_bytes for t in moved) >= blocks * FORMAT.payload_bytes
    prefill.check_books()
    decode.check_books()


def test_the_first_token_comes_before_the_handoff(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(9), phase="prefill")
    bench.finish("a")
    kinds = [type(e) for e in bench.events["a"]]
    assert kinds.index(Tokens) < kinds.index(Prefilled)
    assert kinds[-1] is Prefilled
    assert BlocksPublished in kinds


@pytest.mark.parametrize("early", [True, False])
def test_kv_leaves_while_the_rest_is_computed_or_after_the_first_token(
    make_bench: MakeBench, early: bool
) -> None:
    # 80 tokens in steps of 32: the first 32 are full blocks long before there is a token.
    bench = make_bench(manual=True, publishes_early=early)
    bench.submit("a", prompt(80), phase="prefill")
    deadline = time.monotonic() + 20
    while not bench.tokens("a"):
        assert time.monotonic() < deadline
        waiting = [job.direction for _, job in bench.io.pending]
        if "in" in waiting:
            bench.io.run_one(waiting.index("in"))
        bench.turn()
    assert ("out" in waiting) is early
    bench.finish("a")
    assert isinstance(bench.events["a"][-1], Prefilled)
    bench.check_books()


def test_the_tail_is_deleted_once_it_was_read(make_bench: MakeBench) -> None:
    store = MemoryStore()
    prefill, decode = make_bench(store=store), make_bench(store=store)
    hand_over(prefill, decode, prompt(6))
    tail = prefill.names("r").tail_key
    assert tail is not None
    assert store.exists([tail]) == [False]


@pytest.mark.parametrize("length", [8, 9, 40])
def test_a_pool_hit_gives_the_same_tokens(make_bench: MakeBench, length: int) -> None:
    store = MemoryStore()
    first, second = make_bench(store=store), make_bench(store=store)
    first.submit("a", prompt(length))
    first.finish("a")
    second.submit("a", prompt(length))
    second.finish("a")
    assert second.tokens("a") == expected(prompt(length), 8)
    # At least one token is computed for its logits, and a block is taken over whole or not at all.
    cached = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    report = second.report("a")
    assert (report.cached_tokens, report.local_tokens, report.computed_tokens) == (cached, 0, length - cached)
    assert [t.kind for t in report.transfers if t.kind == "fetch"] == ["fetch"] * (cached // BLOCK_TOKENS)
    exposed = second.worker.metrics.exposition().decode()
    for source, number in (("external_kv_transfer", cached), ("local_compute", length - cached)):
        assert f'source="{source}"}} {float(number)}' in exposed


def test_local_blocks_are_shared(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(40))
    bench.finish("a")
    rows = bench.model.num_rows
    bench.submit("b", prompt(40))
    bench.finish("b")
    assert bench.tokens("b") == expected(prompt(40), 8)
    assert bench.report("b").local_tokens == 36
    assert bench.model.num_rows - rows == 4 + 7  # the last block of the prompt, then seven decode rows


def test_simultaneous_requests_compute_a_common_prefix_once(make_bench: MakeBench) -> None:
    bench = make_bench()
    for i in range(6):
        bench.submit(f"r{i}", [*prompt(24), i], sampling={"max_tokens": 1})
    bench.finish(*(f"r{i}" for i in range(6)))
    for i in range(6):
        assert bench.tokens(f"r{i}") == expected([*prompt(24), i], 1)
    assert bench.model.num_rows == 25 + 5
    reports = [bench.report(f"r{i}") for i in range(6)]
    assert [(r.cached_tokens, r.computed_tokens) for r in reports] == [(0, 25)] + [(24, 1)] * 5


def test_a_conversation_finds_its_answer_cached(make_bench: MakeBench) -> None:
    store = MemoryStore()
    first, second = make_bench(store=store), make_bench(store=store)
    first.submit("turn1", prompt(8), sampling={"max_tokens": 9})
    first.finish("turn1")
    conversation = [*prompt(8), *first.tokens("turn1"), 1, 2, 3]
    second.submit("turn2", conversation)
    second.finish("turn2")
    assert second.tokens("turn2") == expected(conversation, 8)
    assert second.report("turn2").cached_tokens == 16  # 8 prompt + 8 generated with KV; the ninth never ran


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_block_is_recomputed_alone(make_bench: MakeBench, lost: int) -> None:
    store = FaultyStore(MemoryStore())
    prefill, decode = make_bench(store=store), make_bench(store=store)
    tokens = prompt(14)
    prefill.submit("r", tokens, phase="prefill")
    prefill.finish("r")
    store.lose = {prefill.names("r").block_keys[lost]}
    decode.submit(
        "r", tokens, phase="decode", generated_tokens=prefill.tokens("r"), handoff=prefill.names("r")
    )
    decode.finish("r")
    assert prefill.tokens("r") + decode.tokens("r") == expected(tokens, 8)
    # Blocks behind the hole are used, only the tail (2 tokens) does not follow a computed block any more.
    assert decode.report("r").computed_tokens == 4 + 2
    decode.check_books()


def test_a_pool_that_is_down_costs_time_not_answers(make_bench: MakeBench) -> None:
    store = FaultyStore(MemoryStore())
    store.is_down = True
    prefill, decode = make_bench(store=store), make_bench(store=store)
    assert hand_over(prefill, decode, prompt(14)) == expected(prompt(14), 8)
    assert decode.report("r").computed_tokens == 14
    assert decode.report("r").transfers == []


def test_a_resumed_request_goes_on_where_it_was(make_bench: MakeBench) -> None:
    store = MemoryStore()
    prefill, decode = make_bench(store=store), make_bench(store=store)
    tokens = hand_over(prefill, decode, prompt(14), max_tokens=20)
    other = make_bench(store=store)
    other.submit(
        "r",
        prompt(14),
        phase="decode",
        generated_tokens=tokens[:12],
        handoff=prefill.names("r"),
        sampling={"max_tokens": 20},
    )
    other.finish("r")
    assert tokens[:12] + other.tokens("r") == expected(prompt(14), 20)
    # Of 26 tokens, blocks 0 to 2 come by the handoff and 4 and 5 were published by the worker that decoded. The tail
    # of 2 tokens is gone, so block 3 is computed, and the 25th token; running the 26th is decoding.
    assert other.report("r").computed_tokens == BLOCK_TOKENS + 1


def test_prefetched_blocks_are_used_and_reported(make_bench: MakeBench) -> None:
    store = MemoryStore()
    prefill, decode = make_bench(store=store), make_bench(store=store)
    tokens = prompt(14)
    prefill.submit("r", tokens, phase="prefill")
    prefill.finish("r")
    names = prefill.names("r")
    decode.worker.prefetch(
        "link", Prefetch(request_id="r", block_keys=names.block_keys[:2], tokens=tokens[:8])
    )
    decode.turn()
    decode.finish()
    decode.submit("r", tokens, phase="decode", generated_tokens=prefill.tokens("r"), handoff=names)
    decode.finish("r")
    assert prefill.tokens("r") + decode.tokens("r") == expected(tokens, 8)
    fetched = [t.kind for t in decode.report("r").transfers if t.kind.startswith("fetch")]
    assert sorted(fetched) == ["fetch"] * 3 + ["fetch_tail"]
    decode.check_books()


def test_a_cancelled_prefetch_leaves_nothing(make_bench: MakeBench) -> None:
    decode = make_bench()
    keys = block_keys(prompt(8), block_tokens=BLOCK_TOKENS, fingerprint=FINGERPRINT, namespace="default")
    decode.worker.prefetch("link", Prefetch(request_id="r", block_keys=keys, tokens=prompt(8)))
    decode.worker.cancel("link", "r")
    decode.turn()
    decode.finish()
    decode.check_books()


def test_a_handoff_of_other_tokens_is_not_believed(make_bench: MakeBench) -> None:
    store = MemoryStore()
    prefill, decode = make_bench(store=store), make_bench(store=store)
    prefill.submit("r", prompt(14, start=5), phase="prefill")
    prefill.finish("r")
    decode.submit("r", prompt(14), phase="decode", generated_tokens=[7], handoff=prefill.names("r"))
    decode.finish("r")
    assert decode.tokens("r") == expected([*prompt(14), 7], 7)


def test_namespaces_do_not_share(make_bench: MakeBench) -> None:
    bench = make_bench()
    for name, namespace in (("a", "one"), ("b", "two"), ("c", "one")):
        bench.submit(name, prompt(40), namespace=namespace)
        bench.finish(name)
    assert bench.report("b").cached_tokens == 0
    assert bench.report("c").cached_tokens == 36


@pytest.mark.parametrize("phase", ["both", "prefill"])
@pytest.mark.parametrize("cached", ["nothing", "locally", "in the pool"])
def test_a_prompts_tokens_are_scored_whatever_is_cached(
    make_bench: MakeBench, phase: str, cached: str
) -> None:
    tokens, store = prompt(45), MemoryStore()
    bench = make_bench(store=store)
    if cached != "nothing":
        before = bench if cached == "locally" else make_bench(store=store, worker_id="other")
        before.submit("before", tokens)
        before.finish("before")
    bench.submit("a", tokens, phase=phase, sampling={"prompt_logprobs": 3})
    bench.submit("b", tokens)
    bench.finish("a", "b")
    scored = [event for event in bench.events["a"] if isinstance(event, PromptScored)]
    entries = [entry for event in scored for entry in event.logprobs]
    # One step after another, from the second token on: nothing stands before the first.
    assert [event.first for event in scored] == [
        1 + sum(len(event.logprobs) for event in scored[:index]) for index in range(len(scored))
    ]
    assert [entry.token_id for entry in entries] == tokens[1:]
    for place, entry in enumerate(entries):
        logits = row_logits(tokens[: place + 1]).astype(np.float64)
        log_shares = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logits)[:3]
        assert entry.logprob == pytest.approx(log_shares[tokens[place + 1]], abs=1e-6)
        assert [token for token, _ in entry.top] == list(best)
        assert [value for _, value in entry.top] == pytest.approx(log_shares[best], abs=1e-6)
    assert bench.report("a").cached_tokens == 0
    assert bench.report("b").cached_tokens > 0
    assert bench.tokens("a") == expected(tokens, 8 if phase == "both" else 1)
    bench.check_books()


@pytest.mark.parametrize("num_blocks", [12, 13, 16])
def test_preempted_sequences_lose_nothing(make_bench: MakeBench, num_blocks: int) -> None:
    # Three sequences of 8 + 24 tokens want 24 blocks; they get 12 to 16.
    bench = make_bench(num_blocks=num_blocks)
    prompts = {f"r{i}": prompt(8, start=i) for i in range(3)}
    for name, tokens in prompts.items():
        bench.submit(name, tokens, sampling={"max_tokens": 24})
    bench.finish(*prompts)
    for name, tokens in prompts.items():
        assert bench.tokens(name) == expected(tokens, 24), name
    assert bench.worker.metrics.num_preemptions._value.get() > 0
    bench.check_books()


def test_a_stop_token_is_the_last(make_bench: MakeBench) -> None:
    bench = make_bench()
    answer = expected(prompt(10), 8)
    bench.submit("a", prompt(10), sampling={"stop_token_ids": (answer[3],)})
    bench.finish("a")
    assert bench.tokens("a") == answer[: answer.index(answer[3]) + 1]
    last = bench.last("a")
    assert isinstance(last, Finished)
    assert last.finish_reason == "stop"


def test_one_token_under_prefill_finishes_there(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(10), phase="prefill", sampling={"max_tokens": 1})
    bench.finish("a")
    assert bench.tokens("a") == expected(prompt(10), 1)
    last = bench.last("a")
    assert isinstance(last, Finished)
    assert last.finish_reason == "length"


def test_the_context_ends_an_answer(make_bench: MakeBench) -> None:
    bench = make_bench(max_context_tokens=16)
    bench.submit("a", prompt(10), sampling={"max_tokens": 100})
    bench.finish("a")
    assert bench.tokens("a") == expected(prompt(10), 6)
    last = bench.last("a")
    assert isinstance(last, Finished)
    assert last.finish_reason == "length"


def test_a_prompt_that_never_fits_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench(num_blocks=4)
    for name, length in (("long", 16), ("empty", 0)):
        bench.submit(name, prompt(length))
        bench.finish(name)
        last = bench.last(name)
        assert isinstance(last, Failed)
        assert last.code == "too_long"
    bench.submit("fits", prompt(15), sampling={"max_tokens": 4})
    bench.finish("fits")
    assert bench.tokens("fits") == expected(prompt(15), 1)


def test_too_many_waiting_are_refused(make_bench: MakeBench) -> None:
    bench = make_bench(max_waiting=2)
    for i in range(3):
        bench.submit(f"r{i}", prompt(5))
    bench.finish("r0", "r1", "r2")
    codes = [e.code for i in range(3) if isinstance(e := bench.last(f"r{i}"), Failed)]
    assert codes == ["overloaded"]


def test_work_that_waited_too_long_expires(make_bench: MakeBench) -> None:
    now = [100.0]
    bench = make_bench(clock=lambda: now[0], max_running=1)
    bench.submit("first", prompt(5), sampling={"max_tokens": 40}, expires_in_s=1.0)
    bench.submit("late", prompt(5), expires_in_s=1.0)
    bench.turn(3)
    now[0] += 2.0
    bench.finish("first", "late")
    last = bench.last("late")
    assert isinstance(last, Failed)
    assert last.code == "expired"
    assert bench.tokens("first") == expected(prompt(5), 40)  # what was begun is not thrown away


def test_priorities_go_first(make_bench: MakeBench) -> None:
    bench = make_bench(max_running=1)
    for name, priority in (("now", 0), ("later", 5), ("urgent", -1)):
        bench.submit(name, prompt(5), priority=priority, sampling={"max_tokens": 3})
    bench.finish("now", "later", "urgent")
    order = sorted(("now", "later", "urgent"), key=lambda name: list(bench.events).index(name))
    assert order == ["urgent", "now", "later"]


def test_decode_goes_on_beside_a_long_prompt(make_bench: MakeBench) -> None:
    bench = make_bench(num_blocks=256, mixed_prefill_tokens=8)
    bench.submit("reader", prompt(5), sampling={"max_tokens": 60})
    bench.turn(5)
    produced = len(bench.tokens("reader"))
    bench.submit("long", prompt(200, start=3))
    bench.turn(10)
    assert len(bench.tokens("reader")) >= produced + 9
    bench.finish("reader", "long")
    assert bench.tokens("long") == expected(prompt(200, start=3), 8)


def test_cancel_in_every_state_frees_everything(make_bench: MakeBench) -> None:
    bench = make_bench(manual=True, max_running=2)
    bench.submit("loading", prompt(20))
    bench.submit("running", prompt(3), sampling={"max_tokens": 100})
    bench.submit("queued", prompt(9))
    bench.turn(4)
    assert bench.tokens("running")
    assert bench.io.pending[0][1].identity[1] == "loading"
    for name in ("loading", "running", "queued", "unknown"):
        bench.worker.cancel("link", name)
    bench.turn(2)
    for name in ("loading", "running", "queued"):
        last = bench.last(name)
        assert isinstance(last, Finished)
        assert last.finish_reason == "abort"
    assert bench.blocks.num_used > 0  # an IO thread may still write there
    bench.finish()
    bench.check_books()


def test_a_closed_link_cancels_what_came_over_it(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(20), link="one", sampling={"max_tokens": 100})
    bench.submit("b", prompt(21), link="two")
    bench.turn(3)
    bench.worker.close_link("one")
    bench.finish("b")
    assert bench.tokens("b") == expected(prompt(21), 8)
    bench.check_books()


def test_the_same_id_on_two_links_is_two_requests(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(6), link="one")
    bench.submit("a", prompt(6), link="two")
    bench.submit("a", prompt(6), link="two")
    bench.finish("a")
    ends = [e for e in bench.events["a"] if isinstance(e, Finished | Failed)]
    assert [type(e) for e in ends] == [Failed, Finished, Finished]


def test_a_failed_step_fails_its_requests_only(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(6))
    bench.turn()
    bench.model.fail_next = True
    bench.finish("a")
    last = bench.last("a")
    assert isinstance(last, Failed)
    assert last.code == "internal"
    bench.submit("b", prompt(6))
    bench.finish("b")
    assert bench.tokens("b") == expected(prompt(6), 8)
    bench.check_books()


def test_a_row_without_numbers_fails_its_request_only(make_bench: MakeBench) -> None:
    bench = make_bench()
    forward = bench.worker._forward

    def spoil_the_second(batch: StepBatch) -> npt.NDArray[np.float32]:
        logits = forward(batch)
        if len(logits) == 2:
            logits[1, 7] = np.nan
        return logits

    bench.worker._forward = spoil_the_second
    bench.submit("a", prompt(6))
    bench.submit("b", [*prompt(6), 1])
    bench.finish("a", "b")
    last = bench.last("b")
    assert isinstance(last, Failed)
    assert (last.code, "no largest value" in last.message) == ("internal", True)
    assert bench.tokens("a") == expected(prompt(6), 8)
    bench.check_books()


def test_draining_finishes_and_takes_nothing_new(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", prompt(6))
    bench.turn()
    bench.worker.is_draining = True
    bench.submit("b", prompt(6))
    bench.finish("a", "b")
    assert bench.tokens("a") == expected(prompt(6), 8)
    last = bench.last("b")
    assert isinstance(last, Failed)
    assert last.code == "draining"


def test_phases_follow_one_another(make_bench: MakeBench) -> None:
    store = MemoryStore()
    prefill, decode = make_bench(store=store), make_bench(store=store)
    hand_over(prefill, decode, prompt(14))
    assert [p.phase for p in prefill.report("r").phases] == ["queue", "lookup", "prefill", "publish"]
    assert [p.phase for p in decode.report("r").phases] == ["queue", "fetch", "decode", "publish"]
    for report in (prefill.report("r"), decode.report("r")):
        assert report.phases[0].start_s == 0.0
        for before, after in zip(report.phases, report.phases[1:], strict=False):
            assert after.start_s == pytest.approx(before.start_s + before.duration_s, abs=1e-9)
