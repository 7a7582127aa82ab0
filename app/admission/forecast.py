"""What workers get done while work waits for them, and how long a first token takes, learned as it happens (pure)."""

BUSY_MEMORY_S = 8.0
"""Busy seconds after which what was seen counts for 1/e."""
MIN_BUSY_S = 0.25
"""Busy seconds before a rate is believed."""
SPEED_MEMORY = 16
"""First tokens after which what one of them told of the speed counts for 1/e."""
MIN_TELLING_TOKENS = 128
"""Prompt tokens from which the time they take tells how fast they are computed, and not how long a message takes."""
MIN_RELEASED = 8
"""Requests seen to leave the queue before a rate is believed: the first one of a service that warms up, or one that
only fills the place of a client who left, says nothing of all the others."""


class Throughput:
    """Prompt tokens that workers compute a second, and sequences that leave the queue while somebody waits.

    The speed is told by each first token: what was to be computed until it came, over the time that this took. What is
    sent to workers is no measure of it, for they can be sent more at once, and are no faster for it.
    """

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._sequences = 0.0
        self._num_released = 0
        self._tokens = 0.0
        self._tokens_s = 0.0
        self._num_told = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens computed a second; None while too little was seen."""
        return self._tokens / self._tokens_s if self._num_told >= MIN_RELEASED and self._tokens_s else None

    @property
    def sequences_per_s(self) -> float | None:
        """Sequences released a second; None while too little was seen."""
        return self._sequences / self._busy_s if self._is_believed and self._sequences else None

    @property
    def _is_believed(self) -> bool:
        return self._busy_s >= MIN_BUSY_S and self._num_released >= MIN_RELEASED

    def busy(self, seconds: float) -> None:
        """Somebody waited all this time."""
        kept = max(0.0, 1.0 - seconds / BUSY_MEMORY_S)
        self._busy_s = self._busy_s * kept + seconds
        self._sequences *= kept

    def computed(self, num_tokens: int, seconds: float) -> None:
        """So many prompt tokens, others' before its own, were with the workers when a request came to them, and its
        first token came so long after."""
        if num_tokens < MIN_TELLING_TOKENS:
            return
        kept = 1.0 - 1.0 / SPEED_MEMORY
        self._tokens = self._tokens * kept + num_tokens
        self._tokens_s = self._tokens_s * kept + seconds
        self._num_told += 1

    def released(self, num_sequences: int) -> None:
        """A request that had waited was released."""
        self._sequences += num_sequences
        self._num_released += 1

    def wait_s(self, num_tokens: float, num_sequences: float) -> float:
        """Seconds until so much has been released; 0 while nothing is known, which lets the first ones find out."""
        tokens_per_s, sequences_per_s = self.tokens_per_s, self.sequences_per_s
        return max(
            num_tokens / tokens_per_s if tokens_per_s else 0.0,
            num_sequences / sequences_per_s if sequences_per_s else 0.0,
        )


class FirstToken:
    """Seconds from release to first token: smoothed mean and deviation, as TCP keeps them of round trips (RFC 6298)."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._deviation_s = 0.0

    def observe(self, seconds: float) -> None:
        """A released request got its first token."""
        if self._mean_s is None:
            self._mean_s, self._deviation_s = seconds, seconds / 2
            return
        self._deviation_s += (abs(seconds - self._mean_s) - self._deviation_s) / 8
        self._mean_s += (seconds - self._mean_s) / 16

    @property
    def likely_s(self) -> float:
        """What most will not exceed: mean and twice the deviation; 0 while nothing is known."""
        return 0.0 if self._mean_s is None else self._mean_s + 2 * self._deviation_s
