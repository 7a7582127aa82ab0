"""What the live gateway's autoscaling loop would see of a simulated service (`app.matrix.role_switch` sees the real
one)."""

from collections import deque
from statistics import median

from app.matrix.autoscaler import MIN_TOKENS, RECENT_S, Observation, slow
from app.twin.fleet import Fleet
from app.twin.instance import Job

STEPS = 200
"""Prefill steps whose median rate counts."""


class Watch:
    """Notes what becomes of requests; `observe` sums up the last seconds."""

    def __init__(self) -> None:
        self._waiting: dict[int, float] = {}
        self._ttft: deque[tuple[float, float]] = deque()
        self._tpot: deque[tuple[float, float]] = deque()
        self._rates: deque[float] = deque(maxlen=STEPS)

    def arrived(self, job: Job) -> None:
        """A request came; until its first token it counts as waiting."""
        self._waiting[job.number] = job.arrived_at

    def first_token(self, job: Job, now: float) -> None:
        """The request has its first token."""
        del self._waiting[job.number]
        self._ttft.append((now, now - job.arrived_at))

    def finished(self, job: Job, now: float) -> None:
        """The answer is complete."""
        if job.first_token_at is not None and job.request.output_tokens >= MIN_TOKENS:
            self._tpot.append((now, (now - job.first_token_at) / (job.request.output_tokens - 1)))

    def prefilled(self, num_tokens: int, seconds: float) -> None:
        """A prefill step of so many tokens took so long."""
        self._rates.append(num_tokens / seconds)

    def observe(self, now: float, fleet: Fleet) -> Observation:
        """The service at this instant."""
        for recent in (self._ttft, self._tpot):
            while recent and now - recent[0][0] > RECENT_S:
                recent.popleft()
        waits = [seconds for _, seconds in self._ttft] + [now - at for at in self._waiting.values()]
        paces = [seconds for _, seconds in self._tpot]
        for instance in fleet.decode.values():
            paces += instance.paces(now, MIN_TOKENS)
        return Observation(
            now=now,
            workers=fleet.loads(),
            ttft_s=slow(waits),
            tpot_s=slow(paces),
            prefill_tokens_per_s=median(self._rates) if self._rates else None,
        )
