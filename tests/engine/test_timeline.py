import pytest

from engine.timeline import Timeline, shifted


def test_phases_cover_a_life_without_gap_or_overlap() -> None:
    timeline = Timeline(10.0)
    timeline.enter("lookup", 11.0)
    timeline.enter("prefill", 11.5)
    timeline.enter("prefill", 12.0)
    timeline.close(14.0)
    timeline.close(15.0)
    assert [(p.phase, p.start_s, p.duration_s) for p in timeline.phases()] == [
        ("queue", 0.0, 1.0),
        ("lookup", 1.0, 0.5),
        ("prefill", 1.5, 2.5),
    ]
    assert timeline.current is None


def test_time_does_not_run_backwards() -> None:
    timeline = Timeline(10.0)
    with pytest.raises(ValueError, match="queue began at 10.0"):
        timeline.enter("prefill", 9.0)
    timeline.close(11.0)
    with pytest.raises(ValueError, match="closed"):
        timeline.enter("prefill", 12.0)


def test_shifting_moves_only_the_start() -> None:
    timeline = Timeline(0.0)
    timeline.close(2.0)
    (phase,) = shifted(timeline.phases(), 5.0)
    assert (phase.start_s, phase.duration_s) == (5.0, 2.0)
