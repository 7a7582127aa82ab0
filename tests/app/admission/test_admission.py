"""Who goes next is pure: shares by tokens and weights, tiers, priorities, bounds, deadlines and targets."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission.admission import Admission, Capacity, Refused
from app.admission.concurrency import SequenceLimit
from app.admission.fair_share import FairnessWindow, VirtualTokenCounters, jain_index
from app.admission.forecast import FirstToken, Throughput
from app.admission.ticket import Ticket

ONE = Capacity(max_sequences=1, num_prefill_workers=1)


def ticket(tenant: str = "a", *, prompt: int = 100, output: int = 10, **more: Any) -> Ticket:
    values: dict[str, Any] = {"arrived_at": 0.0, "num_sequences": 1, **more}
    return Ticket(tenant=tenant, prompt_tokens=prompt, output_tokens=output, **values)


def admission(**more: Any) -> Admission:
    values: dict[str, Any] = {
        "max_requests": 1000,
        "max_queued_per_tenant": 1000,
        "ttft_target_s": 1000.0,
        "tpot_target_s": None,
        **more,
    }
    return Admission(**values)


def serve_one(queues: Admission, capacity: Capacity, now: float, output: int = 10) -> Ticket:
    """Release exactly one request and bring it to its end."""
    (released,) = queues.release(capacity, now)
    queues.prompt_done(released, released.prompt_tokens, now)
    queues.over(released, output)
    queues.leave(released)
    return released


def test_what_fits_goes_at_once_and_the_rest_waits() -> None:
    queues = admission()
    tickets = [ticket() for _ in range(3)]
    for one in tickets:
        assert queues.offer(one, ONE, 0.0) is None
    assert queues.release(ONE, 0.0) == tickets[:1]
    assert queues.release(ONE, 0.0) == []
    assert (queues.num_requests, queues.num_queued) == (3, 2)
    queues.over(tickets[0], 10)
    assert queues.release(ONE, 1.0) == [tickets[1]]
    queues.leave(tickets[0])
    assert queues.num_requests == 2


def test_prompts_to_be_computed_bound_what_is_released() -> None:
    # Nothing known of the rate: 512 tokens. 300 and 200 fit, 100 more do not, until the first is computed.
    queues = admission()
    capacity = Capacity(max_sequences=64, num_prefill_workers=1)
    first, second, third = (ticket(prompt=n) for n in (300, 200, 100))
    for one in (first, second, third):
        queues.offer(one, capacity, 0.0)
    assert queues.release(capacity, 0.0) == [first, second]
    queues.prompt_done(first, 300, 0.1)
    assert queues.release(capacity, 0.1) == [third]
    huge = ticket(prompt=10**6)
    queues.offer(huge, capacity, 0.2)
    assert queues.release(capacity, 0.2) == []
    queues.prompt_done(second, 200, 0.3)
    queues.prompt_done(third, 100, 0.3)
    assert queues.release(capacity, 0.3) == [huge], (
        "larger than everything, it goes when nothing else is computed"
    )


def test_every_prefill_worker_has_a_prompt_however_large() -> None:
    queues = admission()
    capacity = Capacity(max_sequences=64, num_prefill_workers=3)
    tickets = [ticket(prompt=5000) for _ in range(5)]
    for one in tickets:
        queues.offer(one, capacity, 0.0)
    assert queues.release(capacity, 0.0) == tickets[:3]
    queues.prompt_done(tickets[1], 5000, 1.0)
    assert queues.release(capacity, 1.0) == tickets[3:4]
    queues.prompt_done(tickets[0], 2500, 2.0)
    assert queues.release(capacity, 2.0) == [], "half of its prompt is still to be computed"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("step_s", "ttft_target_s"), [(1.0, 4.0), (0.2, 2.0), (0.02, 1.0), (0.002, 1.0)])
def test_what_a_worker_can_do_comes_in_time_when_five_times_as_much_arrives(
    step_s: float, ttft_target_s: float, batch: int
) -> None:
    """A worker that takes `step_s` for 128 tokens, of one prompt or of several at once, on virtual time."""
    queues = admission(ttft_target_s=ttft_target_s)
    capacity = Capacity(max_sequences=64, num_prefill_workers=1)
    num_steps, arrivals, prompt = 200, 5 * batch, 128 // batch
    at_worker: list[Ticket] = []
    in_step = in_time = done = 0
    for tick in range(num_steps * arrivals):
        now = tick * step_s / arrivals
        if tick % arrivals == 0:
            for _ in range(in_step):
                one = at_worker.pop(0)
                queues.prompt_done(one, prompt, now)
                at_worker += queues.release(capacity, now)
                queues.over(one, 1)
                queues.leave(one)
                if tick >= num_steps * arrivals / 4:  # the first quarter finds out how fast it is
                    done += 1
                    in_time += now - one.arrived_at <= ttft_target_s
        queues.offer(ticket(prompt=prompt, arrived_at=now), capacity, now)
        queues.look(capacity, now)
        queues.expire(now)
        at_worker += queues.release(capacity, now)
        if tick % arrivals == 0:
            in_step = min(batch, len(at_worker))
    # What is sent at once when its speed becomes known, and the window opens, makes it no faster.
    assert queues.throughput.tokens_per_s == pytest.approx(128 / step_s, rel=0.25)
    assert done >= 0.9 * batch * num_steps * 3 / 4, "the worker idled"
    assert in_time >= 0.95 * done


def test_two_tenants_share_by_tokens_whoever_asks_more_often() -> None:
    queues = admission()
    for _ in range(40):
        queues.offer(ticket("short", prompt=100, output=10), ONE, 0.0)  # 100 + 2 x 10 = 120 virtual tokens
    for _ in range(40):
        queues.offer(ticket("long", prompt=340, output=10), ONE, 0.0)  # 360: three short ones
    served = [serve_one(queues, ONE, 1.0).tenant for _ in range(40)]
    assert (served.count("short"), served.count("long")) == (30, 10)


def test_a_weight_of_two_gets_twice_the_tokens() -> None:
    queues = admission()
    for _ in range(60):
        queues.offer(ticket("one"), ONE, 0.0)
        queues.offer(ticket("two", weight=2.0), ONE, 0.0)
    served = [serve_one(queues, ONE, 1.0).tenant for _ in range(60)]
    assert (served.count("two"), served.count("one")) == (40, 20)


def test_who_was_idle_saved_up_no_claim() -> None:
    queues = admission()
    for _ in range(100):
        queues.offer(ticket("busy"), ONE, 0.0)
    for _ in range(50):
        serve_one(queues, ONE, 1.0)
    for _ in range(50):
        queues.offer(ticket("late"), ONE, 2.0)
    served = [serve_one(queues, ONE, 3.0).tenant for _ in range(20)]
    assert served.count("busy") == 10


def test_output_is_settled_to_what_was_produced() -> None:
    # Both ask for 1,000 tokens; one gets 10, the other 1,000. Charged alike, they would take turns.
    queues = admission()
    for _ in range(60):
        queues.offer(ticket("brief", prompt=10, output=1000), ONE, 0.0)
        queues.offer(ticket("wordy", prompt=10, output=1000), ONE, 0.0)
    produced = {"brief": 0, "wordy": 0}
    for _ in range(40):
        (released,) = queues.release(ONE, 1.0)
        num = 10 if released.tenant == "brief" else 1000
        produced[released.tenant] += 10 + 2 * num
        queues.over(released, num)
        queues.leave(released)
    assert abs(produced["brief"] - produced["wordy"]) <= 2010, "they differ by one long answer at most"


def test_tiers_go_first_and_priorities_order_a_tenants_own() -> None:
    queues = admission()
    low, high = ticket(priority=5), ticket(priority=-1)
    other, vip = ticket("b", priority=99), ticket("c", tier=-1, priority=7)
    for one in (low, high, other, vip):
        queues.offer(one, ONE, 0.0)
    order = [serve_one(queues, ONE, 1.0) for _ in range(4)]
    assert order[0] is vip
    assert order.index(high) < order.index(low)
    assert order.index(other) < order.index(low), "another tenant's number says nothing against it"


def test_a_full_house_refuses_or_displaces_whoever_has_most() -> None:
    queues = admission(max_requests=4)
    greedy = [ticket("greedy", arrived_at=float(i)) for i in range(4)]
    for i, one in enumerate(greedy):
        assert queues.offer(one, ONE, float(i)) is None
    queues.release(ONE, 3.0)
    assert queues.offer(ticket("greedy"), ONE, 4.0) == Refused("full", None)
    poor = ticket("poor")
    assert queues.offer(poor, ONE, 4.0) is greedy[3], "the newest of the tenant with the most"
    assert greedy[3].state == "over"
    assert queues.num_requests == 4


def test_one_tenants_queue_is_bounded() -> None:
    queues = admission(max_queued_per_tenant=2)
    for _ in range(3):
        assert queues.offer(ticket(), ONE, 0.0) is None
        queues.release(ONE, 0.0)
    refused = queues.offer(ticket(), ONE, 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "full"
    assert queues.offer(ticket("b"), ONE, 0.0) is None


def test_a_full_house_is_known_before_a_request_is_offered() -> None:
    queues = admission(max_requests=4)
    for _ in range(4):
        queues.offer(ticket(), ONE, 0.0)
    assert queues.refusal(ticket(), ONE, 0.0) == Refused("full", None)
    # Who may have another's room is not refused, and nobody has to go before it comes.
    assert queues.refusal(ticket("poor"), ONE, 0.0) is None
    assert queues.num_requests == 4


def learned(queues: Admission, *, rate: float = 1.0) -> None:
    """Teach it that `rate` requests of 100 tokens leave a second while others wait."""
    queues.look(ONE, 0.0)
    for number in range(20):
        queues.offer(ticket(arrived_at=0.0), ONE, 0.0)
        if number:
            queues.look(ONE, number / rate)
            serve_one(queues, ONE, number / rate)
    assert queues.throughput.sequences_per_s == pytest.approx(rate, rel=0.1)


def test_who_would_be_late_is_refused_with_the_time_to_come_back() -> None:
    queues = admission(ttft_target_s=10.0)
    learned(queues)
    # One a second: the target is met while fewer than 8 (80 % of 10 s) are ahead.
    refused, number = None, 0
    while refused is None:
        refused = queues.offer(ticket(arrived_at=19.0), ONE, 19.0)
        number += 1
    assert isinstance(refused, Refused)
    assert refused.reason == "predicted_late"
    assert 7 <= number <= 10
    assert refused.retry_after_s is not None
    assert 0 < refused.retry_after_s < 2.5
    assert queues.offer(ticket("light", arrived_at=19.0), ONE, 19.0) is None, (
        "a light tenant waits for its share only"
    )
    hurried = queues.offer(ticket("light", arrived_at=19.0, deadline_at=19.5), ONE, 19.0)
    assert hurried == Refused("predicted_deadline", None)


@pytest.mark.parametrize(("first_token_s", "num_queued"), [(None, 16), (2.0, 8)])
def test_the_forecast_that_refuses_by_hand(first_token_s: float | None, num_queued: int) -> None:
    queues = admission(ttft_target_s=10.0)
    queues.offer(ticket(), ONE, 0.0)
    queues.release(ONE, 0.0)
    # 8 requests of 100 tokens in 4 busy seconds: 200 tokens and 2 sequences a second, so half a second for each.
    queues.throughput.busy(4.0)
    for _ in range(8):
        queues.throughput.released(1)
        queues.throughput.computed(200, 1.0)
    # A first sample of 2 s has a deviation of 1 s: 2 + 2 x 1 = 4 s are likely from release to first token.
    if first_token_s is not None:
        queues.first_token.observe(first_token_s)
    # 80 % of 10 s are open: 16 x 0.5 s, or 8 x 0.5 s + 4 s, and not one more.
    for _ in range(num_queued):
        assert queues.offer(ticket(), ONE, 0.0) is None
    assert queues.offer(ticket(), ONE, 0.0) == Refused("predicted_late", 0.5)
    # The same 8.5 s against the caller's own limit.
    assert queues.offer(ticket(deadline_at=8.4), ONE, 0.0) == Refused("predicted_deadline", None)
    assert queues.offer(ticket(deadline_at=8.6), ONE, 0.0) == Refused("predicted_late", 0.5)


def test_queued_work_that_nobody_waits_for_is_taken_out() -> None:
    queues = admission(ttft_target_s=10.0)
    running, patient, hurried = ticket(), ticket(), ticket(deadline_at=2.0)
    for one in (running, patient, hurried):
        queues.offer(one, ONE, 0.0)
    queues.release(ONE, 0.0)
    assert queues.expire(1.9) == []
    assert queues.expire(2.0) == [(hurried, "deadline")]
    assert queues.expire(9.9) == []
    assert queues.expire(10.1) == [(patient, "late")]
    assert (queues.num_queued, queues.num_requests) == (0, 1)


def test_leaving_the_queue_gives_everything_back() -> None:
    queues = admission()
    running, waiting = ticket(), ticket("b")
    queues.offer(running, ONE, 0.0)
    queues.release(ONE, 0.0)
    queues.offer(waiting, ONE, 0.0)
    queues.leave(waiting)
    queues.leave(waiting)
    queues.over(running, 3)
    queues.leave(running)
    assert (queues.num_requests, queues.num_sequences, queues.prompt_tokens) == (0, 0, 0)
    assert queues.queued_by_tenant() == {}


def test_what_other_gateways_have_there_is_left_room_for() -> None:
    queues = admission()
    # 8 places, of which others have 3: 5 are left.
    capacity = Capacity(max_sequences=8, num_prefill_workers=1, others_sequences=3, num_rivals=1)
    for _ in range(8):
        queues.offer(ticket(), capacity, 0.0)
    assert len(queues.release(capacity, 0.0)) == 5


def test_a_gateway_that_came_later_has_an_equal_share() -> None:
    queues = admission()
    # All 9 places are taken by two other gateways, and more prompt tokens than the window: a third of them is ours.
    capacity = Capacity(
        max_sequences=9, num_prefill_workers=1, others_sequences=9, others_prompt_tokens=9000, num_rivals=2
    )
    for _ in range(9):
        queues.offer(ticket(prompt=50), capacity, 0.0)
    assert len(queues.release(capacity, 0.0)) == 3


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.integers(-1, 1)), max_size=40),
    st.tuples(st.sampled_from("abcd"), st.integers(1, 500), st.integers(-1, 1), st.none() | st.floats(0, 20)),
    st.integers(1, 40),
)
def test_a_request_refused_at_its_least_would_be_refused_in_full(
    ahead: list[tuple[str, int, int]], one: tuple[str, int, int, float | None], max_requests: int
) -> None:
    queues = admission(ttft_target_s=10.0, max_requests=max_requests)
    queues.throughput.busy(4.0)
    for _ in range(8):
        queues.throughput.released(1)
        queues.throughput.computed(200, 1.0)
    for tenant, prompt, priority in ahead:
        queues.offer(ticket(tenant, prompt=prompt, priority=priority), ONE, 0.0)
    tenant, prompt, priority, deadline_at = one
    more: dict[str, Any] = {"priority": priority, "deadline_at": deadline_at}
    if queues.refusal(ticket(tenant, prompt=1, **more), ONE, 0.0) is not None:
        assert isinstance(queues.offer(ticket(tenant, prompt=prompt, **more), ONE, 0.0), Refused)


requests = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.integers(1, 200), st.integers(1, 3)),
    min_size=1,
    max_size=60,
)


@given(requests, st.integers(1, 8))
def test_nothing_is_lost_and_nothing_is_held(rows: list[tuple[str, int, int, int]], size: int) -> None:
    queues = admission()
    capacity = Capacity(max_sequences=size, num_prefill_workers=1)
    seen: list[Ticket] = []
    under_way: list[Ticket] = []
    for now, (tenant, prompt, output, num) in enumerate(rows):
        queues.offer(ticket(tenant, prompt=prompt, output=output, num_sequences=num), capacity, float(now))
        under_way += queues.release(capacity, float(now))
    while under_way:
        done = under_way.pop(0)
        seen.append(done)
        for _ in range(done.num_sequences):
            queues.over(done, 1)
        queues.leave(done)
        under_way += queues.release(capacity, 1000.0)
        assert queues.num_sequences <= max(size, 3)
    assert len(seen) == len(rows)
    assert (queues.num_requests, queues.num_sequences, queues.prompt_tokens) == (0, 0, 0)
    assert queues.num_uncomputed == 0


def test_jain_by_hand() -> None:
    assert jain_index([5, 5, 5]) == 1.0
    assert jain_index([1, 0, 0, 0]) == 0.25
    assert jain_index([1, 3]) == pytest.approx(16 / 20)  # (1 + 3)^2 / (2 x (1 + 9))
    assert jain_index([0, 0]) is None


def test_the_fairness_window_looks_only_at_rivals() -> None:
    window = FairnessWindow(60.0)
    window.look(["a", "b"], 0.0)
    assert window.index() is None
    for second in range(1, 11):
        window.served("a", 300.0, 1.0)
        window.served("b", 100.0, 1.0)
        window.served("rare", 1.0, 1.0)
        window.look(["a", "b"], float(second))
    assert window.index() == pytest.approx(16 / 20)
    window.look([], 100.0)
    assert window.index() is None


def test_a_forgotten_tenant_begins_where_the_last_one_was_served() -> None:
    counters = VirtualTokenCounters()
    counters.join("a", [])
    counters.charge("a", 500.0, 2.0)
    counters.join("b", [])
    assert (counters["a"], counters["b"]) == (250.0, 250.0)
    counters.join("c", ["a", "b"])
    assert counters.next(["c", "b", "a"]) == "a"


def test_one_release_while_the_service_warms_up_is_no_rate() -> None:
    throughput = Throughput()
    throughput.busy(2.0)
    for number in range(8):
        # One in two seconds would mean 128 s for 64 requests, and that all of them are refused.
        assert throughput.wait_s(6400, 64) == 0.0, number
        throughput.released(1)
    assert throughput.wait_s(6400, 64) == pytest.approx(16.0)  # 8 in 2 s


def test_throughput_counts_only_time_in_which_somebody_waited() -> None:
    throughput = Throughput()
    assert throughput.wait_s(100, 1) == 0.0
    for _ in range(200):
        throughput.busy(0.1)
        throughput.released(1)
        throughput.computed(250, 0.5)
    # 500 tokens and 10 sequences a second: 1,000 tokens take 2 s, 30 sequences 3 s.
    assert throughput.wait_s(1000, 1) == pytest.approx(2.0, rel=0.02)
    assert throughput.wait_s(1000, 30) == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("load", [0.8, 0.95, 3.0])
def test_the_speed_of_a_worker_is_known_however_seldom_somebody_waits(load: float) -> None:
    """A worker that does one prompt of 500 tokens a second, on virtual time; requests come at random."""
    queues = admission(max_requests=10**6, ttft_target_s=30.0)
    capacity = Capacity(max_sequences=1, num_prefill_workers=1)
    draw = random.Random(7)
    arrival, busy_until = 0.0, math.inf
    at_worker: Ticket | None = None
    now = next_look = 0.0
    while now < 400.0:
        now = min(arrival, busy_until, next_look)
        if now == busy_until:
            assert at_worker is not None
            queues.prompt_done(at_worker, 500, now)
            queues.over(at_worker, 1)
            queues.leave(at_worker)
            at_worker, busy_until = None, math.inf
        elif now == arrival:
            queues.offer(ticket(prompt=500, arrived_at=now), capacity, now)
            arrival += draw.expovariate(load)
        else:
            queues.look(capacity, now)
            next_look = now + 0.05
        for released in queues.release(capacity, now):
            at_worker, busy_until = released, now + 1.0
    assert queues.throughput.tokens_per_s == pytest.approx(500, rel=0.15)


def test_the_likely_first_token_covers_the_spread() -> None:
    first = FirstToken()
    assert first.likely_s == 0.0
    for number in range(400):
        first.observe(0.1 if number % 2 else 0.3)
    assert 0.35 < first.likely_s < 0.45  # mean 0.2 and twice the mean deviation 0.1


def test_fewer_sequences_decode_together_when_tokens_come_late() -> None:
    limit = SequenceLimit(0.05, first=10)
    assert limit.within(64) == 10
    limit.step(0.0, 10, 64)
    limit.observe(1.0, 10)  # 100 ms a token
    limit.step(0.6, 10, 64)
    assert limit.within(64) == 9
    for number in range(1, 5):
        limit.observe(0.3, 10)  # 30 ms a token
        limit.step(0.6 + number, 9 + number, 64)
    assert limit.within(64) == 13
    limit.observe(0.3, 10)
    limit.step(9.0, 2, 64)
    assert limit.within(64) == 13, "no higher than what is used up"
    assert SequenceLimit(None).within(64) == 64
