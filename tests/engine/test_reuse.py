"""Fetch or recompute: the decision on numbers derived by hand, and a worker that makes it."""

import time
from collections.abc import Sequence

import pytest

from engine.protocol import Reuse
from engine.reuse import MEMORY_S, Choice, FetchEstimate, FetchTime, choose
from memory_pool.store import Get, MemoryStore
from tests.engine.fakes import Bench, expected

MB = 1_000_000


def test_fetching_wins_where_it_is_faster() -> None:
    # 4 blocks of 1 MB at 100 MB/s: 5 ms + 40 ms = 45 ms, against 4 x 20 ms of computing.
    found = choose([0.020] * 4, MB, FetchEstimate(0.005, 100 * MB))
    assert found.num_blocks == 4
    assert (found.fetch_s, found.compute_s) == (pytest.approx(0.045), pytest.approx(0.080))


def test_computing_wins_where_the_pool_is_slow() -> None:
    # 4 MB at 10 MB/s: 400 ms and more; computing: 80 ms.
    found = choose([0.020] * 4, MB, FetchEstimate(0.005, 10 * MB))
    assert found.num_blocks == 0
    assert found.fetch_s == pytest.approx(0.405)


def test_the_latency_counts_once() -> None:
    # A block moves in 10 ms and is computed in 20 ms, but every fetch waits 35 ms first:
    # of 3 blocks: 35 + 30 = 65 > 60 ms; of 4: 35 + 40 = 75 < 80 ms.
    slow_start = FetchEstimate(0.035, 100 * MB)
    assert choose([0.020] * 3, MB, slow_start).num_blocks == 0
    assert choose([0.020] * 4, MB, slow_start).num_blocks == 4


def test_a_prefix_is_fetched_and_the_rest_computed() -> None:
    # A block moves in 10 ms. The first two take 30 ms to compute, the others 5 ms:
    # fetch 2, compute 2: 20 + 10 = 30 ms; fetch 4: 40 ms; compute all: 70 ms.
    found = choose([0.030, 0.030, 0.005, 0.005], MB, FetchEstimate(0.0, 100 * MB))
    assert found.num_blocks == 2


def test_what_is_not_known_is_tried() -> None:
    assert choose([0.020] * 3, MB, None) == Choice(3, None, pytest.approx(0.060))
    assert choose([], MB, FetchEstimate(1.0, 1.0)) == Choice(0, None, 0)


def test_estimates_follow_what_was_measured_and_are_forgotten() -> None:
    times = FetchTime()
    assert times.estimate(0.0) is None
    times.looked_up(0.010)
    times.fetched(10 * MB, 0.110, now=1.0)  # 10 MB in the 100 ms behind the latency
    first = times.estimate(1.0)
    assert first is not None
    assert first.seconds(5 * MB) == pytest.approx(0.010 + 0.050)
    # 0.7 x 10 MB + 10 MB = 17 MB in 0.7 x 0.1 s + 1.0 s.
    times.fetched(10 * MB, 1.010, now=2.0)
    second = times.estimate(2.0)
    assert second is not None
    assert second.bytes_per_s == pytest.approx(17 * MB / 1.07)
    assert times.estimate(2.0 + MEMORY_S) is not None
    assert times.estimate(2.1 + MEMORY_S) is None


def test_an_empty_fetch_teaches_nothing() -> None:
    times = FetchTime()
    times.fetched(0, 5.0, now=1.0)
    assert times.estimate(1.0) is None


class SlowStore(MemoryStore):
    """Reads of which take `delay_s`."""

    delay_s = 0.0

    def get_many(self, gets: Sequence[Get]) -> list[int | None]:
        time.sleep(self.delay_s)
        return super().get_many(gets)


def test_a_pool_that_is_slower_than_computing_is_left_alone() -> None:
    store = SlowStore()
    prompts = {name: [(start + i * 7) % 61 for i in range(41)] for start, name in enumerate("abcd")}
    first = Bench(store=store)
    for name, tokens in prompts.items():
        first.submit(name, tokens)
    first.finish(*prompts)
    first.close()
    second = Bench(store=store)

    def reuse(name: str) -> Reuse:
        second.submit(name, prompts[name])
        second.finish(name)
        assert second.tokens(name) == expected(prompts[name], 8)
        reuse = second.report(name).reuse
        assert reuse is not None
        assert reuse.found_blocks == 10  # all whole blocks before the last token
        return reuse

    tried = reuse("a")
    assert (tried.fetched_blocks, tried.fetch_s) == (10, None)
    store.delay_s = 0.4
    slow = reuse("b")  # nobody could know
    assert slow.fetched_blocks == 10
    warned = reuse("c")
    assert warned.fetch_s is not None
    assert warned.fetch_s > warned.compute_s
    assert warned.fetched_blocks == 0
    assert second.report("c").computed_tokens == 41
    second.close()
