"""Decisions of the scheduler on bare values: no model, no clock, no bytes."""

from dataclasses import dataclass, field

import pytest

from engine.block_manager import BlockManager
from engine.scheduler import Limits, Plan, Scheduler
from engine.step_time import StepTimeModel


@dataclass(eq=False)
class Item:
    name: str
    num_tokens: int
    arrived_at: float = 0.0
    priority: int = 0
    expires_at: float | None = None
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    computes_all: bool = False
    num_prompt: int = 0

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed


def make(num_blocks: int = 100, step_time: StepTimeModel | None = None, **limits: float) -> Scheduler[Item]:
    defaults = {"max_step_tokens": 16, "mixed_prefill_tokens": 8, "min_prefill_tokens": 4}
    return Scheduler(BlockManager(num_blocks, 4), Limits(**{**defaults, **limits}), step_time)  # type: ignore[arg-type]  # numbers of either kind


def item(name: str, num_tokens: int, arrived_at: float = 0.0, **fields: float) -> Item:
    keys = [f"{name}{i}".encode() for i in range(num_tokens // 4)]
    return Item(name, num_tokens, arrived_at, keys=keys, num_prompt=num_tokens, **fields)  # type: ignore[arg-type]  # numbers of either kind


def begin(scheduler: Scheduler[Item], *items: Item) -> None:
    for work in items:
        scheduler.submit(work)
    for work in scheduler.admit():
        scheduler.start(work)


def run(scheduler: Scheduler[Item]) -> Plan[Item]:
    """One step; whoever is up to date gets a token."""
    plan = scheduler.plan()
    for slot in plan.slots:
        scheduler.commit(slot.work, slot.num_rows)
        if not slot.work.num_uncomputed:
            slot.work.num_tokens += 1
            if slot.work.num_tokens // 4 > len(slot.work.keys):
                slot.work.keys.append(f"{slot.work.name}{len(slot.work.keys)}".encode())
    return plan


def rows(plan: Plan[Item]) -> list[tuple[str, int]]:
    return [(slot.work.name, slot.num_rows) for slot in plan.slots]


def test_a_long_prompt_goes_in_chunks_and_oldest_first() -> None:
    scheduler = make()
    begin(scheduler, item("b", 10, 2.0), item("a", 22, 1.0))
    assert rows(run(scheduler)) == [("a", 16)]
    # 6 rows end a; of the 10 that are left b takes all it needs.
    assert rows(run(scheduler)) == [("a", 6), ("b", 10)]
    assert rows(run(scheduler)) == [("a", 1), ("b", 1)]


def test_a_prompt_does_not_join_those_that_are_enough() -> None:
    # By the prior a step takes 3 ms, as long as 6 rows: for 5 prompts 5 / 2 · 6 = 15 would do, fewer than 64 never do.
    scheduler = make(max_step_tokens=128)
    begin(scheduler, item("a", 66), *(item(name, 24, at) for at, name in enumerate("bcde", start=1)))
    assert rows(scheduler.plan()) == [("a", 66)]
    scheduler.remove(scheduler.running[0])
    assert rows(scheduler.plan()) == [("b", 24), ("c", 24), ("d", 24)]


def test_beside_decode_rows_prompts_join_as_far_as_there_is_room() -> None:
    scheduler = make(max_step_tokens=128, mixed_prefill_tokens=100)
    begin(scheduler, item("reader", 3))
    run(scheduler)
    begin(scheduler, item("a", 66, 1.0), item("b", 24, 2.0))
    assert rows(scheduler.plan()) == [("reader", 1), ("a", 66), ("b", 24)]


def test_a_step_is_filled_where_that_is_wanted() -> None:
    scheduler = make(max_step_tokens=128, fills_steps=True)
    begin(scheduler, item("a", 66, 1.0), item("b", 20, 2.0))
    assert rows(scheduler.plan()) == [("a", 66), ("b", 20)]


def handed_over(scheduler: Scheduler[Item], *names: str) -> None:
    """Answers whose first token is known, with all KV but that token's."""
    for name in names:
        scheduler.submit(item(name, 8))
    for work in scheduler.admit():
        work.num_tokens, work.num_computed = 9, 8
        scheduler.start(work)


def test_answers_begun_elsewhere_join_one_by_one() -> None:
    scheduler = make()
    handed_over(scheduler, "a", "b", "c")
    assert [rows(run(scheduler)) for _ in range(3)] == [
        [("a", 1)],
        [("a", 1), ("b", 1)],
        [("a", 1), ("b", 1), ("c", 1)],
    ]
    assert not scheduler.has_joining


def test_the_more_decode_the_more_join() -> None:
    scheduler = make(joining_share=2)
    handed_over(scheduler, *"abcdefgh")
    # One; one for 1; one for 2; one for 3; two for 4; two for 6.
    assert [len(run(scheduler).slots) for _ in range(6)] == [1, 2, 3, 4, 6, 8]


def test_all_join_where_no_share_is_set() -> None:
    scheduler = make(joining_share=None)
    handed_over(scheduler, "a", "b", "c")
    assert len(scheduler.plan().slots) == 3


def test_who_leaves_before_it_joins_is_not_waited_for() -> None:
    scheduler = make()
    handed_over(scheduler, "a", "b", "c")
    run(scheduler)
    scheduler.remove(scheduler.running[1])
    assert rows(run(scheduler)) == [("a", 1), ("c", 1)]
    assert not scheduler.has_joining


def test_prompts_found_in_the_cache_do_not_wait_to_join() -> None:
    scheduler = make()
    for name in ("a", "b", "c"):
        scheduler.submit(item(name, 9))
    for work in scheduler.admit():
        work.num_computed = 8
        scheduler.start(work)
    assert len(scheduler.plan().slots) == 3


def test_chunks_end_with_a_block() -> None:
    scheduler = make(max_step_tokens=10)
    begin(scheduler, item("a", 30))
    assert rows(run(scheduler)) == [("a", 8)]


def test_decode_rows_come_first_and_bound_the_prefill_beside_them() -> None:
    scheduler = make()
    begin(scheduler, item("reader", 3))
    run(scheduler)
    begin(scheduler, item("long", 100, 1.0))
    plan = run(scheduler)
    assert rows(plan) == [("reader", 1), ("long", 8)]
    assert (plan.num_decode, plan.num_prefill) == (1, 8)
    # Row of the reader at position 3 sees 4 tokens; rows of the prompt see 1 + 2 + … + 8.
    assert plan.num_attended == 4 + 36


def test_a_tpot_target_sets_the_chunk() -> None:
    # The prior: 3 ms + 1 ms a decode row + 0.5 ms a prefill row. 10.1 ms leave 6.1 ms: 12 rows.
    step_time = StepTimeModel(attended_token_s=1e-12)
    scheduler = make(step_time=step_time, tpot_target_s=0.0101)
    begin(scheduler, item("reader", 3))
    run(scheduler)
    begin(scheduler, item("long", 100, 1.0))
    assert rows(scheduler.plan()) == [("reader", 1), ("long", 12)]


def test_a_tpot_target_that_leaves_nothing_still_lets_prompts_move() -> None:
    scheduler = make(tpot_target_s=0.001)
    begin(scheduler, item("reader", 3))
    run(scheduler)
    scheduler.running.append(item("long", 100, 1.0))
    scheduler.running[-1].blocks = scheduler.blocks.allocate(25) or []
    assert rows(scheduler.plan()) == [("reader", 1), ("long", 4)]


def test_a_tpot_target_bounds_the_batch() -> None:
    # (10 ms - 3 ms) / 1 ms a row = 7 sequences.
    scheduler = make(step_time=StepTimeModel(attended_token_s=1e-12), tpot_target_s=0.010)
    begin(scheduler, *(item(f"r{i}", 3, float(i)) for i in range(4)))
    begin(scheduler, *(item(f"s{i}", 3, 10.0 + i) for i in range(6)))
    assert (len(scheduler.running), len(scheduler.waiting)) == (7, 3)


def test_admission_needs_blocks_and_leaves_one_for_each_running() -> None:
    scheduler = make(num_blocks=7)
    begin(scheduler, item("a", 12, 1.0), item("b", 12, 2.0), item("c", 1, 3.0))
    # a takes 3 of 7 blocks; b needs 3 + 1 in reserve and gets them; c would leave fewer than two.
    assert [w.name for w in scheduler.running] == ["a", "b"]
    # Nobody overtakes: c waits although it is small.
    assert [w.name for w in scheduler.waiting] == ["c"]


def test_the_youngest_of_the_lowest_priority_gives_way() -> None:
    scheduler = make(num_blocks=8, max_step_tokens=32)
    begin(scheduler, item("old", 7, 1.0), item("dear", 7, 3.0, priority=-1), item("young", 7, 2.0))
    run(scheduler)
    run(scheduler)  # all grow to 9 tokens, for which 3 · 3 blocks are wanted and 8 are there
    plan = run(scheduler)
    assert [w.name for w in plan.preempted] == ["young"]
    assert [w.name for w in scheduler.running] == ["dear", "old"]
    young = plan.preempted[0]
    assert (young.num_computed, young.blocks, young.num_tokens) == (0, [], 9)
    # Its two full blocks are kept by name until someone needs the room.
    assert scheduler.blocks.match(young.keys[:1]) != []


def test_expiry_takes_only_those_that_never_began() -> None:
    scheduler = make(max_running=1)
    begin(scheduler, item("a", 3, 0.0, expires_at=1.0), item("b", 3, 0.5, expires_at=1.0), item("c", 3, 0.6))
    assert [w.name for w in scheduler.expire(0.9)] == []
    assert [w.name for w in scheduler.expire(1.0)] == ["b"]
    assert [w.name for w in scheduler.waiting] == ["c"]


def test_whoever_needs_an_arriving_block_waits_and_others_pass() -> None:
    scheduler = make()
    a, b = item("a", 12, 1.0), item("b", 12, 2.0)
    scheduler.submit(a)
    scheduler.submit(b)
    assert scheduler.admit({a.keys[0]}) == [b]
    assert scheduler.admit() == [a]


def test_a_block_in_the_making_is_not_made_twice() -> None:
    scheduler = make(max_step_tokens=64)
    same = [item("x", 12, float(i)) for i in range(3)]
    begin(scheduler, *same)
    assert rows(run(scheduler)) == [("x", 12)]
    # Two of three blocks can be taken over, the last is computed for its logits, by one at a time or both at once.
    plan = run(scheduler)
    assert sorted(slot.num_rows for slot in plan.slots) == [1, 4]
    assert same[1].blocks[:2] == same[0].blocks[:2]


def test_drafts_use_spare_blocks_only() -> None:
    scheduler = make(num_blocks=4)
    a = item("a", 7)
    begin(scheduler, a)
    run(scheduler)
    a.draft = [1, 2, 3]
    (slot,) = scheduler.plan().slots  # 8 tokens, 7 computed: the draft reaches into a third block
    assert (slot.num_rows, slot.num_draft) == (4, 3)
    scheduler.blocks.allocate(1)
    a.blocks, spare = a.blocks[:2], a.blocks[2:]
    scheduler.blocks.hold([])
    assert spare
    (slot,) = scheduler.plan().slots
    assert (slot.num_rows, slot.num_draft) == (1, 0)


def test_queued_tokens_count_what_is_still_to_compute() -> None:
    scheduler = make(max_running=1)
    begin(scheduler, item("a", 10, 1.0), item("b", 20, 2.0))
    assert scheduler.queued_tokens == 9 + 20
    run(scheduler)
    assert scheduler.queued_tokens == 0 + 20


def test_limits_are_values() -> None:
    with pytest.raises(AttributeError):
        Limits().max_running = 3  # type: ignore[misc]  # that is the point
