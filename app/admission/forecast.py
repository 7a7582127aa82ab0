"""What workers get done while work waits for them, and how long a first token takes, learned as it happens (pure)."""

BUSY_MEMORY_S = 8.0
"""Busy seconds after which what was seen counts for 1/e."""
MIN_BUSY_S = 0.25
"""Busy seconds before a rate is believed."""
MIN_COMPUTED = 8
"""Requests seen to be computed before a rate is believed: the first one of a service that warms up says nothing of all
the others."""


class Throughput:
    """Prompt tokens and sequences that workers begin to answer a second, counted only while somebody waits for them.

    What is sent to them would not do for a measure: they can be sent more at once, and are no faster for it.
    """

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._tokens = 0.0
        self._sequences = 0.0
        self._num_computed = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens computed a second; None while too little was seen."""
        return self._tokens / self._busy_s if self._is_believed and self._tokens else None

    @property
    def sequences_per_s(self) -> float | None:
        """Sequences begun a second; None while too little was seen."""
        return self._sequences / self._busy_s if self._is_believed and self._sequences else None

    @property
    def _is_believed(self) -> bool:
        return self._busy_s >= MIN_BUSY_S and self._num_computed >= MIN_COMPUTED

    def busy(self, seconds: float) -> None:
        """Somebody waited all this time."""
        kept = max(0.0, 1.0 - seconds / BUSY_MEMORY_S)
        self._busy_s = self._busy_s * kept + seconds
        self._tokens *= kept
        self._sequences *= kept

    def computed(self, num_tokens: int, num_sequences: int) -> None:
        """So much of a request was computed while others waited."""
        self._tokens += num_tokens
        self._sequences += num_sequences
        self._num_computed += 1

    def wait_s(self, num_tokens: float, num_sequences: float) -> float:
        """Seconds until so much has been begun; 0 while nothing is known, which lets the first ones find out."""
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
