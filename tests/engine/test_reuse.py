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


def test_the_fastest_of_the_last_three_fetches_counts_while_it_is_news() -> None:
    times = FetchTime()
    times.looked_up(0.030)
    times.looked_up(0.010)
    times.fetched(10 * MB, 0.110, now=1.0)  # 10 MB in the 100 ms behind the latency: 100 MB/s
    times.fetched(10 * MB, 2.0, now=2.0)
    assert times.estimate(2.0) is None, "two do not tell"
    times.fetched(1 * MB, 2.0, now=3.0)
    known = times.estimate(3.0)
    assert known is not None
    assert known.seconds(5 * MB) == pytest.approx(0.010 + 0.050)
    times.fetched(
        10 * MB, 1.010, now=4.0
    )  # the first is forgotten; the fastest left brought 10 MB in a second
    slow = times.estimate(4.0)
    assert slow is not None
    assert slow.bytes_per_s == pytest.approx(10 * MB)
    assert times.estimate(2.0 + MEMORY_S) is not None
    assert times.estimate(2.1 + MEMORY_S) is None


def test_an_empty_fetch_teaches_nothing() -> None:
    times = FetchTime()
    for _ in range(3):
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
    prompts = {name: [(start + i * 7) % 61 for i in range(41)] for start, name in enumerate("abcde")}
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
    store.delay_s = 0.3
    for name in "bcd":  # nobody could know
        assert reuse(name).fetched_blocks == 10
    warned = reuse("e")
    assert warned.fetch_s is not None
    assert warned.fetch_s > warned.compute_s
    assert warned.fetched_blocks == 0
    assert second.report("e").computed_tokens == 41
    second.close()
