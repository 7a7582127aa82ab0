import pytest

from engine.speculation import PROBE_EVERY, Drafter, Guesser, StepCosts, accepted
from tests.engine.fakes import Bench, expected


class Item:
    def __init__(self, tokens: list[int], num_draftable: int = 100) -> None:
        self.tokens = tokens
        self.draft: list[int] = []
        self.guesser: Guesser | None = Guesser()
        self.num_draftable = num_draftable

    def allowed_part(self, draft: list[int]) -> list[int]:
        return draft


@pytest.mark.parametrize(
    ("draft", "sampled", "count"),
    [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 9, 3, 4], 1), ([1], [2, 3], 0), ([], [5], 0)],
)
def test_a_draft_is_right_up_to_its_first_error(draft: list[int], sampled: list[int], count: int) -> None:
    assert accepted(draft, sampled) == count


def test_a_guess_continues_the_last_occurrence() -> None:
    guesser = Guesser()
    assert guesser.guess([1, 2, 3, 4, 5, 1, 2, 3], 3) == [4, 5, 1]
    assert guesser.guess([1, 2, 3, 4, 5, 1, 2, 3, 8, 1, 2, 3], 2) == [8, 1]
    assert guesser.guess([1, 2, 3, 4, 5, 1, 2, 3, 8, 1, 2, 3, 7], 2) == []
    assert Guesser().guess([1, 2], 4) == []


def test_a_longer_match_is_the_better_guess() -> None:
    # 3 4 was followed by 6 lately, but 1 2 3 4 by 5; where only two tokens match, they decide.
    assert Guesser().guess([1, 2, 3, 4, 5, 9, 3, 4, 6, 1, 2, 3, 4], 1) == [5]
    assert Guesser().guess([1, 2, 3, 4, 5, 9, 3, 4, 6, 8, 3, 4], 2) == [6, 8]


def test_right_guesses_are_trusted_and_wrong_ones_are_not() -> None:
    good, bad = Guesser(), Guesser()
    for _ in range(10):
        good.learn(4, 4)
        bad.learn(4, 0)
    assert good.probability > 0.95
    assert bad.probability < 0.1


def costs(seconds: dict[int, float]) -> StepCosts:
    result = StepCosts()
    for num_rows, value in seconds.items():
        for _ in range(5):
            result.observe(num_rows, value)
    return result


def test_costs_between_and_beyond_what_was_measured() -> None:
    known = costs({1: 0.010, 5: 0.014})
    assert known.seconds(1) == pytest.approx(0.010)
    assert known.seconds(3) == pytest.approx(0.012)
    assert known.seconds(9) == pytest.approx(0.014)  # not known yet: to be tried
    assert StepCosts().seconds(1) is None
    assert costs({4: 0.02}).seconds(1) == pytest.approx(0.02)


def test_one_slow_step_does_not_condemn_its_size() -> None:
    known = costs({1: 0.010})
    known.observe(4, 0.5)
    known.observe(4, 0.012)
    assert known.seconds(4) == pytest.approx(0.012, rel=0.2)


def test_cheap_rows_are_drafted_and_dear_ones_are_not() -> None:
    drafter = Drafter()
    drafter.costs = costs({1: 0.010, 9: 0.0101})
    work = Item([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3])
    drafter.propose([work])
    # Rows that cost next to nothing are worth it to the last one; drafts begin short and double while they are right.
    assert work.draft == [4, 5]
    for length in (4, 8, 8):
        assert work.guesser is not None
        work.guesser.learn(len(work.draft), len(work.draft))
        drafter.propose([work])
        assert work.draft == [4, 5, 6, 7, 8, 9, 10, 1][:length]
    # A row that costs as much as a step gains less than it takes, however sure: (1 + 0.99) / 2 < 1.
    drafter.costs = costs({1: 0.010, 2: 0.020, 9: 0.090})
    work.draft = []
    drafter.propose([work])
    assert work.draft == []


def test_a_sequence_whose_guesses_fail_is_left_alone_but_probed() -> None:
    drafter = Drafter()
    drafter.costs = costs({1: 0.010, 2: 0.013, 9: 0.030})
    work = Item([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3])
    assert work.guesser is not None
    for _ in range(10):
        work.guesser.learn(1, 0)
    lengths = []
    for _ in range(2 * PROBE_EVERY):
        work.draft = []
        drafter.propose([work])
        lengths.append(len(work.draft))
    assert sum(lengths) == 2
    assert max(lengths) == 1


def test_the_surer_sequence_gets_the_rows() -> None:
    drafter = Drafter()
    drafter.costs = costs({2: 0.010, 4: 0.0125, 18: 0.030})
    sure, unsure = (Item([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3]) for _ in range(2))
    assert sure.guesser is not None
    assert unsure.guesser is not None
    for _ in range(10):
        sure.guesser.learn(8, 8)
        unsure.guesser.learn(8, 0)
    drafter.propose([sure, unsure])
    assert len(sure.draft) > len(unsure.draft) == 0


def test_nothing_is_drafted_beyond_the_last_token() -> None:
    drafter = Drafter()
    drafter.costs = costs({1: 0.010, 9: 0.010})
    works = [Item([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], num_draftable=n) for n in (0, 2)]
    drafter.propose(works)
    assert [len(w.draft) for w in works] == [0, 2]


class Oracle(Drafter):
    """Knows the answer, except for every fourth token."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__()
        self.answer = answer

    def propose(self, decoding: object) -> None:
        for work in decoding:  # type: ignore[attr-defined]  # sequences
            begin = work.num_generated
            guess = self.answer[begin : begin + min(6, work.num_draftable)]
            work.draft = [t if (begin + i) % 4 else t + 1 for i, t in enumerate(guess)]


def test_drafts_save_steps_and_change_nothing() -> None:
    prompt = list(range(20))
    answer = expected(prompt, 40)
    bench = Bench(drafter=Oracle(answer))
    bench.submit("a", prompt, sampling={"max_tokens": 40})
    bench.finish("a")
    assert bench.tokens("a") == answer
    # Every fourth guess is wrong: four tokens a step, 10 steps for 39 tokens behind the first.
    assert bench.model.num_steps == 1 + 10
    metrics = bench.worker.metrics
    assert metrics.generation_tokens._value.get() == 40
    assert metrics.spec_accepted_tokens._value.get() == 39 - 10
    bench.check_books()
    bench.close()


def test_a_seeded_answer_is_the_same_with_drafts_as_without() -> None:
    prompt = list(range(20))
    sampling = {"max_tokens": 40, "temperature": 1.5, "seed": 11}
    plain = Bench()
    plain.submit("a", prompt, sampling=sampling)
    plain.finish("a")
    answer = plain.tokens("a")
    assert answer != expected(prompt, 40), "nothing was drawn"
    drafted = Bench(drafter=Oracle(answer))
    drafted.submit("a", prompt, sampling=sampling)
    drafted.finish("a")
    assert drafted.tokens("a") == answer
    assert drafted.model.num_steps == 1 + 10
    for bench in (plain, drafted):
        bench.check_books()
        bench.close()


def test_a_stop_token_inside_a_draft_ends_the_answer() -> None:
    prompt = list(range(20))
    answer = expected(prompt, 40)
    bench = Bench(drafter=Oracle(answer))
    stop = next(i for i in range(5, 40) if answer[i] not in answer[:i])
    bench.submit("a", prompt, sampling={"max_tokens": 40, "stop_token_ids": (answer[stop],)})
    bench.finish("a")
    assert bench.tokens("a") == answer[: stop + 1]
    bench.check_books()
    bench.close()
