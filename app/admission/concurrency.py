"""How many sequences may decode together so that each token comes in time: additive increase, multiplicative decrease
(pure)."""

STEP_S = 0.5
"""Between two changes of the limit."""
GROW_BELOW, SHRINK_ABOVE = 0.8, 0.95
"""Shares of the target between which the limit stays."""
SHRINK = 0.9


class SequenceLimit:
    """A limit that follows the time per output token, as it is seen while sequences stream."""

    def __init__(self, target_s: float | None, *, first: int = 8) -> None:
        self._target_s = target_s
        self._limit = float(first)
        self._gaps_s = 0.0
        self._tokens = 0
        self._stepped_at: float | None = None

    def observe(self, gap_s: float, num_tokens: int) -> None:
        """`num_tokens` of one sequence came `gap_s` after those before them."""
        self._gaps_s += gap_s
        self._tokens += num_tokens

    def within(self, most: int) -> int:
        """The limit now, at most `most` and at least 1; `most` itself without a target."""
        return most if self._target_s is None else max(1, min(most, int(self._limit)))

    def step(self, now: float, num_active: int, most: int) -> None:
        """Adapt, if it is time to: up only while `num_active` sequences use up what is allowed."""
        if self._target_s is None:
            return
        if self._stepped_at is None:
            self._stepped_at = now
        if now - self._stepped_at < STEP_S or self._tokens == 0:
            return
        per_token_s = self._gaps_s / self._tokens
        self._stepped_at, self._gaps_s, self._tokens = now, 0.0, 0
        if per_token_s > self._target_s * SHRINK_ABOVE:
            self._limit = max(1.0, min(self._limit, num_active) * SHRINK)
        elif per_token_s < self._target_s * GROW_BELOW and num_active >= int(self._limit):
            self._limit = min(float(most), self._limit + 1)
