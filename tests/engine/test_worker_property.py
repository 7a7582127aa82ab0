"""Whatever happens in whatever order: right tokens for all who are left, and books that balance."""

from collections.abc import Sequence as Items
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.protocol import Failed, Finished, Prefetch, Prefilled
from engine.speculation import Drafter
from memory_pool.store import MemoryStore
from tests.engine.fakes import BLOCK_TOKENS, Bench, FaultyStore, expected

NUM_BLOCKS = 18
FAMILIES = [[(f * 11 + i * 7) % 61 for i in range(40)] for f in range(3)]
"""Prompts are beginnings of these, so that requests share blocks."""


class RecklessDrafter(Drafter):
    """Guesses the true continuation, spoilt here and there, as long as blocks and limits allow."""

    def __init__(self) -> None:
        super().__init__()
        self.truth: dict[tuple[int, ...], list[int]] = {}
        self.count = 0

    def propose(self, decoding: Items[Any]) -> None:
        for work in decoding:
            prompt = tuple(work.tokens[: work.num_prompt])
            truth = self.truth.setdefault(prompt, expected(list(prompt), 30))
            self.count += 1
            room = max(0, min(self.count % 7, work.num_draftable))
            work.draft = truth[work.num_generated : work.num_generated + room]
            if work.draft and self.count % 3 == 0:
                work.draft[self.count % len(work.draft)] ^= 1


class WorkerLife(RuleBasedStateMachine):
    """Requests come, are handed over, cancelled; the pool fails, loses blocks; IO ends in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.store = FaultyStore(MemoryStore())
        self.bench = Bench(
            store=self.store, num_blocks=NUM_BLOCKS, manual=True, max_running=5, max_step_tokens=12
        )
        self.asked: dict[str, dict[str, Any]] = {}
        self.cancelled: set[str] = set()
        self.failed_step = False

    def _submit(self, phase: str, prompt: list[int], max_tokens: int, link: str, **fields: Any) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "phase": phase,
            "link": link,
            **fields,
        }
        self.bench.submit(name, prompt, link=link, phase=phase, sampling={"max_tokens": max_tokens}, **fields)

    @rule(
        phase=st.sampled_from(["both", "prefill"]),
        family=st.sampled_from(FAMILIES),
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 25),
        link=st.sampled_from(["x", "y"]),
        priority=st.integers(0, 1),
    )
    def submit(
        self, phase: str, family: list[int], length: int, max_tokens: int, link: str, priority: int
    ) -> None:
        self._submit(phase, family[:length], max_tokens, link, priority=priority)

    @rule(which=st.integers(0, 99), with_prefetch=st.booleans())
    def hand_over(self, which: int, with_prefetch: bool) -> None:
        done = [n for n, a in self.asked.items() if a["phase"] == "prefill" and self.bench.is_over(n)]
        done = [n for n in done if isinstance(self.bench.last(n), Prefilled)]
        if not done:
            return
        name = done[which % len(done)]
        asked, handoff = self.asked[name], self.bench.names(name)
        if with_prefetch:
            tokens = asked["prompt"][: len(handoff.block_keys) * BLOCK_TOKENS]
            prefetch = Prefetch(
                request_id=f"r{len(self.asked)}", block_keys=handoff.block_keys, tokens=tokens
            )
            self.bench.worker.prefetch("x", prefetch)
        generated = self.bench.tokens(name)
        self._submit(
            "decode", asked["prompt"], asked["max_tokens"], "x", generated_tokens=generated, handoff=handoff
        )

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        name = list(self.asked)[which % len(self.asked)]
        self.cancelled.add(name)
        self.bench.worker.cancel(self.asked[name]["link"], name)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 99))
    def cancel_in_the_midst_of_a_step(self, which: int) -> None:
        name = list(self.asked)[which % len(self.asked)]
        link = self.asked[name]["link"]
        self.cancelled.add(name)
        self.bench.model.during = lambda: self.bench.worker.cancel(link, name)

    @rule(family=st.sampled_from(FAMILIES), length=st.integers(8, 40))
    def submit_in_the_midst_of_a_step(self, family: list[int], length: int) -> None:
        self.bench.model.during = lambda: self._submit("both", family[:length], 5, "x")

    @rule(link=st.sampled_from(["x", "y"]))
    def close_link(self, link: str) -> None:
        self.cancelled |= {n for n, a in self.asked.items() if a["link"] == link}
        self.bench.worker.close_link(link)

    @rule(count=st.integers(1, 12))
    def turn(self, count: int) -> None:
        self.bench.turn(count)

    @precondition(lambda self: self.bench.io.pending)
    @rule(which=st.integers(0, 99), after=st.integers(0, 3))
    def move_blocks(self, which: int, after: int) -> None:
        self.bench.io.run_one(which % len(self.bench.io.pending))
        self.bench.turn(after)

    @rule(is_down=st.booleans())
    def pool_fails(self, is_down: bool) -> None:
        self.store.is_down = is_down

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 99), index=st.integers(0, 9))
    def pool_loses_a_block(self, which: int, index: int) -> None:
        prompt = list(self.asked.values())[which % len(self.asked)]["prompt"]
        keys = self.bench.worker_keys(prompt)
        if keys:
            self.store.lose.add(keys[index % len(keys)])

    @rule()
    def step_fails(self) -> None:
        self.failed_step = self.bench.model.fail_next = True

    @invariant()
    def books_balance(self) -> None:
        scheduler = self.bench.worker._scheduler
        held = [w.blocks for queue in (scheduler.loading, scheduler.running) for w in queue]
        self.bench.blocks.check_integrity([*held, *self.bench.handoff.holdings()])
        assert all(not w.blocks for w in scheduler.waiting)

    def teardown(self) -> None:
        self.bench.model.fail_next, self.bench.model.during = False, None
        self.bench.finish(*self.asked)
        for name, asked in self.asked.items():
            last = self.bench.last(name)
            given = asked.get("generated_tokens", [])
            answer = expected(asked["prompt"], asked["max_tokens"])
            tokens = given + self.bench.tokens(name)
            assert tokens == answer[: len(tokens)], name
            if isinstance(last, Failed):
                assert last.code == "internal"
                assert self.failed_step
            elif isinstance(last, Prefilled):
                assert len(tokens) == 1
            else:
                assert isinstance(last, Finished)
                if last.finish_reason == "abort":
                    assert name in self.cancelled
                else:
                    assert tokens == answer
        self.bench.check_books()
        self.bench.close()


TestWorkerLife = WorkerLife.TestCase
TestWorkerLife.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
