"""Draft tokens: guesses at what comes next, verified by one step of several rows. Pure.

A draft costs nothing in correctness: each guessed token is compared with the token sampled at its place, whose draw
depends only on the seed, the position and the logits, and the logits of a row depend only on the tokens before it.
What is accepted is therefore what would have been generated anyway, greedy or sampled.

Guesses come from the sequence's own text (prompt lookup): what followed the last occurrence of its latest tokens. That
is often right where an answer repeats its prompt, as in editing and summarising, and rarely elsewhere. So each
sequence keeps count of how often its guesses were right, each worker of how long steps of how many rows take, and
only those rows are drafted that are expected to raise the tokens per second of the whole step.
"""

from collections.abc import Sequence as Items
from typing import Protocol

NGRAMS = (4, 2)
"""Numbers of latest tokens to look for in the text before them: the longer match is the better guess."""
MAX_DRAFT = 8
"""Guessed tokens of one sequence in one step."""
MAX_DRAFT_ROWS = 16
"""Guessed tokens of all sequences in one step."""
MIN_GAIN = 1.05
"""Expected tokens per second with drafts over those without, from which on it is worth it."""
PROBE_EVERY = 24
"""A sequence whose guesses did not pay tries one token again after so many missed occasions."""
_MEMORY = 0.9
_START_RIGHT, _START_TRIED = 1.0, 2.0
_FIRST_REACH = 2
_COST_WEIGHT = 0.1
_SURE_AFTER = 3
_FORGET_AFTER = 512


def accepted(draft: Items[int], sampled: Items[int]) -> int:
    """How many leading draft tokens were right. `sampled[i]` is what the model puts where `draft[i]` was guessed."""
    count = 0
    for guess, token in zip(draft, sampled, strict=False):
        if guess != token:
            break
        count += 1
    return count


class Guesser:
    """Guesses of one sequence, from its own tokens, and how often they are right."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._num_indexed = min(NGRAMS)
        self._right = _START_RIGHT
        self._tried = _START_TRIED
        self._num_passed_over = 0
        self.reach = _FIRST_REACH
        """Longest draft for now: it doubles with each draft that was right to the end and shrinks to what was right."""

    @property
    def probability(self) -> float:
        """That a guessed token is right if those before it are."""
        return self._right / self._tried

    def guess(self, tokens: Items[int], num_tokens: int) -> list[int]:
        """Up to `num_tokens` tokens that may follow; empty where the latest tokens are new."""
        # The newest n-grams are not indexed: nothing has followed them yet.
        for end in range(self._num_indexed, len(tokens)):
            for size in NGRAMS:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens))
        for size in NGRAMS:
            at = self._after.get(tuple(tokens[-size:]))
            if at is not None:
                return list(tokens[at : at + num_tokens])
        return []

    def learn(self, num_drafted: int, num_right: int) -> None:
        """What came of a draft."""
        # Tokens behind the first wrong one say nothing: they were guessed after a different text.
        tried = min(num_right + 1, num_drafted)
        self._right = _MEMORY * self._right + num_right
        self._tried = _MEMORY * self._tried + tried
        self._num_passed_over = 0
        self.reach = min(2 * self.reach, MAX_DRAFT) if num_right == num_drafted else num_right + 1

    def pass_over(self) -> bool:
        """Note a guess that was not worth a row; whether it is time to try one all the same."""
        self._num_passed_over += 1
        return self._num_passed_over % PROBE_EVERY == 0


class StepCosts:
    """Seconds of a pure decode step by its number of rows, as measured lately."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._times: dict[int, int] = {}
        self._seen_at: dict[int, int] = {}
        self._num_steps = 0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn from a step."""
        self._num_steps += 1
        times = self._times.get(num_rows, 0)
        known = self._seconds.get(num_rows, seconds)
        if times < _SURE_AFTER:
            # A first step that something else held up must not keep this size from being tried again.
            known = min(known, seconds)
        self._seconds[num_rows] = known + _COST_WEIGHT * (seconds - known)
        self._times[num_rows] = times + 1
        self._seen_at[num_rows] = self._num_steps
        if self._num_steps % 64 == 0:
            self._forget()

    def seconds(self, num_rows: int) -> float | None:
        """Expected seconds; None before the first step.

        Between two measured sizes in proportion; beyond the largest as that one, so that larger sizes get tried. More
        rows never cost less: a step that happened to be slow must not make a larger one look cheap.
        """
        below = [n for n in self._seconds if n <= num_rows]
        above = [n for n in self._seconds if n > num_rows]
        if not below:
            return self._seconds[min(above)] if above else None
        nearest, floor = max(below), max(self._seconds[n] for n in below)
        if nearest == num_rows or not above:
            return floor
        upper = min(above)
        share = (num_rows - nearest) / (upper - nearest)
        return max(floor, self._seconds[nearest] + share * (self._seconds[upper] - self._seconds[nearest]))

    def _forget(self) -> None:
        for num_rows, seen_at in list(self._seen_at.items()):
            if self._num_steps - seen_at > _FORGET_AFTER:
                del self._seconds[num_rows], self._times[num_rows], self._seen_at[num_rows]


class Drafted(Protocol):
    """What drafting needs to know of a decoding sequence."""

    tokens: list[int]
    draft: list[int]
    guesser: Guesser | None

    @property
    def num_draftable(self) -> int:
        """How many tokens it may still produce besides the next."""
        ...

    def allowed_part(self, draft: list[int]) -> list[int]:
        """As much of a draft as may follow its tokens."""
        ...


class Drafter:
    """Chooses the drafts of a worker's steps."""

    def __init__(self) -> None:
        self.costs = StepCosts()

    def propose(self, decoding: Items[Drafted]) -> None:
        """Set the `draft` of each sequence that is about to decode, in a step of these sequences only."""
        guesses = []
        for work in decoding:
            if work.guesser is not None and work.num_draftable > 0:
                room = min(work.guesser.reach, work.num_draftable)
                guess = work.allowed_part(work.guesser.guess(work.tokens, room))
                if guess:
                    guesses.append((work, work.guesser, guess))
        if not guesses:
            return
        lengths = self._lengths(len(decoding), [(g.probability, len(guess)) for _, g, guess in guesses])
        for (work, guesser, guess), length in zip(guesses, lengths, strict=True):
            if length or guesser.pass_over():
                work.draft = guess[: max(length, 1)]

    def learn(self, work: Drafted, num_drafted: int, num_right: int) -> None:
        """What came of a draft."""
        if work.guesser is not None and num_drafted:
            work.guesser.learn(num_drafted, num_right)

    def _lengths(self, num_rows: int, guesses: list[tuple[float, int]]) -> list[int]:
        """The lengths with the most expected tokens per second: rows are added most promising first."""
        lengths = [0] * len(guesses)
        best = list(lengths)
        base = self._rate(float(num_rows), num_rows)
        best_rate = MIN_GAIN * base
        tokens = float(num_rows)
        for extra in range(1, MAX_DRAFT_ROWS + 1):
            chances = [
                (p ** (length + 1), index)
                for index, ((p, longest), length) in enumerate(zip(guesses, lengths, strict=True))
                if length < longest
            ]
            if not chances:
                break
            chance, index = max(chances)
            tokens += chance
            lengths[index] += 1
            rate = self._rate(tokens, num_rows + extra)
            if rate > best_rate:
                best, best_rate = list(lengths), rate
        return best

    def _rate(self, tokens: float, num_rows: int) -> float:
        seconds = self.costs.seconds(num_rows)
        return tokens / seconds if seconds else 0.0
