import random

import pytest

from engine.step_time import StepTimeModel


def seconds(num_decode: int, num_prefill: int, num_attended: int) -> float:
    """A machine that is four times as fast as the prior believes at prefill."""
    return 2e-3 + 8e-4 * num_decode + 1.25e-4 * num_prefill + 2e-8 * num_attended


def trained(noise: float = 0.0) -> StepTimeModel:
    model = StepTimeModel()
    rng = random.Random(1)
    for _ in range(400):
        step = (rng.randrange(0, 33), rng.choice([0, 0, 32, 64, 256]), rng.randrange(100, 60_000))
        model.observe(*step, seconds(*step) * (1 + noise * rng.uniform(-1, 1)))
    return model


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.02), (0.3, 0.12)])
def test_it_learns_the_machine(noise: float, tolerance: float) -> None:
    model = trained(noise)
    for step in [(1, 0, 300), (16, 0, 8000), (8, 64, 20_000), (0, 256, 33_000)]:
        assert model.predict(*step) == pytest.approx(seconds(*step), rel=tolerance)


def test_the_prior_answers_before_the_first_step() -> None:
    # 3 ms + 4 · 1 ms + 10 · 0.5 ms
    assert StepTimeModel().predict(4, 10, 0) == pytest.approx(12e-3)


def test_it_follows_a_machine_that_became_slower() -> None:
    model = trained()
    for _ in range(1500):
        model.observe(8, 0, 4000, 2 * seconds(8, 0, 4000))
    assert model.predict(8, 0, 4000) == pytest.approx(2 * seconds(8, 0, 4000), rel=0.05)


def test_rows_that_fit_a_target() -> None:
    model = trained()
    # 20 ms - (2 ms + 8 · 0.8 ms + 8,000 · 20 ns) = 11.44 ms of prefill rows at 0.125 ms = 91
    assert model.prefill_rows_within(0.020, 8, 8000) == pytest.approx(91, abs=3)
    assert model.prefill_rows_within(0.005, 8, 8000) == 0
    # (20 ms - 2 ms) / (0.8 ms + 500 · 20 ns) = 22.2
    assert model.decode_rows_within(0.020, 500) == pytest.approx(22, abs=1)
    assert model.decode_rows_within(0.0001, 500) == 1


def test_rows_that_are_enough_for_a_step() -> None:
    # 14 prompts: 14 / 2 · 2 ms of prefill rows at 0.125 ms
    assert trained().enough_prefill_rows(14) == pytest.approx(112, abs=6)
    # 2 / 2 · 2 ms are 16 rows, but fewer than 64 never do.
    assert trained().enough_prefill_rows(2) == 64


def test_prompts_that_are_enough_for_a_step_end_sooner_alone() -> None:
    # Steps of 2 ms + 0.125 ms a row. Ten prompts of r rows, one or two to a step: the mean of their ends.
    def mean_s(rows: int, together: int) -> float:
        ends = [(step + 1) * (0.002 + together * rows * 0.000125) for step in range(10 // together)]
        return sum(ends) / len(ends)

    enough = trained().enough_prefill_rows(10)
    assert mean_s(enough + 8, 1) < mean_s(enough + 8, 2)
    assert mean_s(enough - 8, 1) > mean_s(enough - 8, 2)


def test_coefficients_are_never_negative() -> None:
    model = StepTimeModel()
    for _ in range(50):
        model.observe(16, 0, 100, 0.010)
        model.observe(1, 0, 100, 0.020)
    assert model.predict(100, 100, 10_000) >= model.predict(0, 0, 0) > 0


def test_the_cost_of_a_block_is_its_rows_and_what_they_attend_to() -> None:
    model = StepTimeModel(fixed_s=1.0, decode_row_s=1.0, prefill_row_s=5e-4, attended_token_s=5e-8)
    # 32 rows behind 100 tokens attend to 101 + 102 + … + 132 = 32 x 100 + 528 tokens. The step is run anyway.
    assert model.prefill_s(100, 32) == pytest.approx(32 * 5e-4 + 3728 * 5e-8)
