"""Routes are pure: what is fit, how it scores, who is picked, and the reason that is kept."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.routing.router import Demand, route
from app.routing.scorers import Candidate, batch_score, link_score, local_score, memory_score, queue_score
from engine.protocol import Location

DEMAND = Demand(model="m", num_prompt_tokens=100, kv_bytes_per_token=23040)


def worker(worker_id: str, role: Any, **more: Any) -> Candidate:
    values: dict[str, Any] = {
        "worker_id": worker_id,
        "role": role,
        "state": "ready",
        "is_connected": True,
        "model": "m",
        "location": Location(node=0, npu=0, die=0),
        "max_context_tokens": 8192,
        "num_sequences": 0,
        "num_queued_tokens": 0,
        "kv_blocks_used": 0,
        "kv_blocks_total": 100,
        **more,
    }
    return Candidate(**values)


def pair(chosen: Any) -> tuple[str | None, str]:
    return chosen.prefill_worker, chosen.decode_worker


def test_modes_follow_from_who_is_there() -> None:
    p, d, b = worker("p", "prefill"), worker("d", "decode"), worker("b", "both")
    for workers, expected in (
        ([p, d], (("p", "d"), "disaggregated")),
        ([b], ((None, "b"), "aggregated")),
        ([d], ((None, "d"), "decode_worker_alone")),
        ([p], ((None, "p"), "prefill_worker_alone")),
    ):
        chosen = route(workers, DEMAND)
        assert chosen is not None
        assert (pair(chosen), chosen.reason.mode) == expected
    assert route([], DEMAND) is None


def test_every_filter_says_why() -> None:
    fit = worker("fit", "both")
    unfit = {
        "a": (worker("a", "both", model="other"), "serves another model"),
        "b": (worker("b", "both", is_connected=False), "not connected"),
        "c": (worker("c", "both", state="draining"), "draining"),
        "d": (worker("d", "both", max_context_tokens=99), "context too short"),
        "e": (worker("e", "both"), "failed this request before"),
    }
    demand = Demand(model="m", num_prompt_tokens=100, avoid=["e"])
    chosen = route([fit, *(w for w, _ in unfit.values())], demand)
    assert chosen is not None
    assert pair(chosen) == (None, "fit")
    assert chosen.reason.excluded == {worker_id: why for worker_id, (_, why) in unfit.items()}


def test_load_moves_work_away_and_known_blocks_draw_it() -> None:
    busy, idle = worker("busy", "prefill", num_queued_tokens=2048), worker("idle", "prefill")
    decoder = worker("d", "decode")
    chosen = route([busy, idle, decoder], DEMAND)
    assert chosen is not None
    assert chosen.prefill_worker == "idle"
    # 0.6 x 0.5 (2,048 tokens ahead halve the queue score) + 0.4 x 1 (all local) = 0.7 > 0.6 x 1.
    demand = Demand(model="m", num_prompt_tokens=100, num_local_tokens={"busy": 100})
    chosen = route([busy, idle, decoder], demand)
    assert chosen is not None
    assert chosen.prefill_worker == "busy"
    assert [scored.score for scored in chosen.reason.prefill] == [0.7, 0.6]


def test_scores_by_hand() -> None:
    assert queue_score(worker("w", "prefill", num_queued_tokens=6144)) == 0.25  # 2048 / (2048 + 6144)
    assert batch_score(worker("w", "decode", num_sequences=16)) == 0.5
    assert memory_score(worker("w", "decode", kv_blocks_used=25)) == 0.75
    assert memory_score(worker("w", "decode", kv_blocks_total=0)) == 0.5
    assert local_score(64, 128) == 0.5
    here = worker("h", "prefill")
    assert link_score(None, here, 10**9) == 1.0
    assert link_score(here, worker("t", "decode"), 10**9) == 1.0
    far = worker("f", "decode", location=Location(node=12, npu=0, die=0))
    assert 0 < link_score(here, far, 10**9) < link_score(here, far, 10**6) < 1


candidates = st.builds(
    worker,
    st.text("abcdef", min_size=1, max_size=3),
    st.sampled_from(["prefill", "decode", "both"]),
    state=st.sampled_from(["ready", "ready", "draining", "starting"]),
    is_connected=st.sampled_from([True, True, False]),
    num_sequences=st.integers(0, 1000),
    num_queued_tokens=st.integers(0, 10**6),
    kv_blocks_used=st.integers(0, 100),
    location=st.builds(Location, node=st.integers(0, 47), npu=st.integers(0, 7), die=st.integers(0, 1)),
)


@given(st.lists(candidates, max_size=6, unique_by=lambda candidate: candidate.worker_id))
def test_a_route_names_fit_workers_of_the_right_role_whatever_the_order(workers: list[Candidate]) -> None:
    chosen = route(workers, DEMAND)
    assert route(workers[::-1], DEMAND) is None if chosen is None else True
    fit = {w.worker_id: w for w in workers if w.state == "ready" and w.is_connected}
    assert (chosen is None) == (not fit)
    if chosen is None:
        return
    again = route(workers[::-1], DEMAND)
    assert again is not None
    assert pair(again) == pair(chosen)
    assert chosen.decode_worker in fit
    if chosen.prefill_worker is not None:
        assert fit[chosen.prefill_worker].role != "decode"
        assert fit[chosen.decode_worker].role != "prefill"
    for scored in (*chosen.reason.prefill, *chosen.reason.decode):
        assert 0 <= scored.score <= 1
        assert all(0 <= value <= 1 for value in scored.scores.values())
