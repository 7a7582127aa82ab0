"""What a tenant, user or key may use, and the counters that a request is charged to. Pure.

A limit is set for a subject (tenant, user or key), for one model or for all of them. A request must fit under every
limit that speaks of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from memory_pool.reservations import Charge, Counter

SubjectKind = Literal["tenant", "user", "key"]
ALL_MODELS = ""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One row of limits; None leaves a measure unlimited. The budget is in nano units of the currency a month."""

    subject_kind: SubjectKind
    subject_id: str
    model: str = ALL_MODELS
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    monthly_budget_nano: int | None = None

    def speaks_of(self, model: str) -> bool:
        """Whether a request for `model` counts here."""
        return self.model in (ALL_MODELS, model)

    @property
    def name(self) -> str:
        """As an error names it."""
        return self.subject_kind + (f" for {self.model}" if self.model else "")


@dataclass(frozen=True)
class LimitedCharge:
    """A charge and the limit it comes from; `measure` names what ran out in errors."""

    charge: Charge
    limit: Limit
    measure: Literal["requests per minute", "tokens per minute", "concurrent requests", "monthly budget"]


def charges(
    limits: Sequence[Limit], tenant_id: str, model: str, *, num_tokens: int, cost_nano: int, month: str
) -> list[LimitedCharge]:
    """What a request of at most `num_tokens` tokens and `cost_nano` must be charged to; `month` is `YYYY-MM`, UTC.

    Every counter of one tenant carries the tenant's id as its hash tag, so that all are charged in one step.
    """
    found: list[LimitedCharge] = []

    def charge(limit: Limit, what: str, counter: Counter, amount: int, most: int) -> Charge:
        name = f"cm:q:{{{tenant_id}}}:{limit.subject_kind}:{limit.subject_id}:{limit.model}:{what}"
        return Charge(name, counter, amount, most)

    for limit in limits:
        if not limit.speaks_of(model):
            continue
        if limit.requests_per_minute is not None:
            made = charge(limit, "requests", "window", 1, limit.requests_per_minute)
            found.append(LimitedCharge(made, limit, "requests per minute"))
        if limit.tokens_per_minute is not None:
            made = charge(limit, "tokens", "window", num_tokens, limit.tokens_per_minute)
            found.append(LimitedCharge(made, limit, "tokens per minute"))
        if limit.concurrent_requests is not None:
            made = charge(limit, "concurrent", "leases", 1, limit.concurrent_requests)
            found.append(LimitedCharge(made, limit, "concurrent requests"))
        if limit.monthly_budget_nano is not None:
            made = charge(limit, f"spent:{month}", "budget", cost_nano, limit.monthly_budget_nano)
            found.append(LimitedCharge(made, limit, "monthly budget"))
    return found


def spare_tokens(limits: Sequence[Limit], model: str) -> int | None:
    """The smallest tokens-per-minute limit on `model`: no request can hold more. None: there is none."""
    return min(
        (
            limit.tokens_per_minute
            for limit in limits
            if limit.tokens_per_minute is not None and limit.speaks_of(model)
        ),
        default=None,
    )
