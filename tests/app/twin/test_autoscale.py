"""The live autoscaler on virtual time: a load whose mix shifts, and what it is worth over every fixed split."""

import pytest

from app.twin.errors import TwinError
from app.twin.outcome import Outcome
from app.twin.scenario import Scenario
from app.twin.simulator import Simulator
from app.twin.trace import Request
from tests.app.twin.clockwork import ClockworkMachine, spec

TTFT_S, TPOT_S = 2.0, 0.1


def shifting_load() -> list[Request]:
    """Two minutes of 2.4 prompts of 1000 tokens a second with answers of one token, then three of 6 answers of 40."""
    prompts = [Request(i / 2.4, 1000, 1, ()) for i in range(int(120 * 2.4))]
    answers = [Request(120 + i / 6, 10, 40, ()) for i in range(180 * 6)]
    return prompts + answers


def serve(prefill: int, *, autoscale: bool = False) -> Outcome:
    # Prefill does 1000 tokens/s, so the first load keeps 2.4 instances busy. A decode step of n sequences takes
    # (1 + n) x 10 ms: within 100 ms nine at most, 90 tokens/s, so 240 tokens/s need 2.7 instances.
    machine = ClockworkMachine(step_s=0.010, sequence_s=0.010)
    return Simulator(
        machine,
        spec(
            prefill_instances=prefill,
            decode_instances=4 - prefill,
            autoscale=autoscale,
            role_switch_s=1.0,
            slo_ttft_s=TTFT_S,
            slo_tpot_s=TPOT_S,
        ),
    ).run(shifting_load())


def attainment(outcome: Outcome) -> float:
    """Share of the requests that meet both targets."""
    good = 0
    for job in outcome.jobs:
        assert job.first_token_at is not None
        assert job.finished_at is not None
        in_time = job.first_token_at - job.arrived_at <= TTFT_S
        good += in_time and job.finished_at - job.first_token_at <= TPOT_S * (job.request.output_tokens - 1)
    return good / len(outcome.jobs)


def test_turning_instances_beats_every_fixed_split() -> None:
    fixed = {prefill: attainment(serve(prefill)) for prefill in (1, 2, 3)}
    scaled = serve(2, autoscale=True)

    assert attainment(scaled) > max(fixed.values()) + 0.1
    # 2:2 becomes 3:1 for the prompts, then 2:2 and 1:3 for the answers
    roles = [change.role for _, change in scaled.role_changes]
    assert roles[:3] == ["prefill", "decode", "decode"]
    before, after = (at for at, _ in scaled.role_changes[:2])
    assert before < 120 < after


def test_a_load_that_fits_its_split_turns_nothing() -> None:
    machine = ClockworkMachine(step_s=0.010, sequence_s=0.010)
    calm = spec(prefill_instances=2, decode_instances=2, autoscale=True, slo_ttft_s=TTFT_S, slo_tpot_s=TPOT_S)
    outcome = Simulator(machine, calm).run([Request(float(i), 500, 20, ()) for i in range(100)])
    assert outcome.role_changes == []
    assert all(job.finished_at is not None for job in outcome.jobs)


def test_instances_that_turn_have_one_size() -> None:
    with pytest.raises(TwinError, match="^autoscale: .*prefill_npus is 16 and decode_npus 160"):
        Scenario(autoscale=True)
