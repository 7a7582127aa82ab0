"""What tokens cost. Pure; money in nano units of the currency (10^-9), so that sums are exact."""

from dataclasses import dataclass
from decimal import Decimal

NANO = 10**9
PER = 10**6
"""Prices are per this many tokens."""


@dataclass(frozen=True)
class Price:
    """Nano units for a million tokens."""

    input_nano: int = 0
    cached_input_nano: int = 0
    output_nano: int = 0

    def cost_nano(self, prompt_tokens: int, cached_tokens: int | None, completion_tokens: int) -> int:
        """What a request costs, rounded up; unknown cached tokens are charged as computed ones."""
        cached = min(cached_tokens or 0, prompt_tokens)
        total = (
            (prompt_tokens - cached) * self.input_nano
            + cached * self.cached_input_nano
            + completion_tokens * self.output_nano
        )
        return -(-total // PER)

    def most_nano(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The most a request can cost."""
        dearest = Price(max(self.input_nano, self.cached_input_nano), 0, self.output_nano)
        return dearest.cost_nano(prompt_tokens, 0, completion_tokens)


FREE = Price()


def to_nano(amount: Decimal) -> int:
    """An amount of the currency in nano units."""
    return int((amount * NANO).to_integral_value())


def from_nano(amount_nano: int) -> Decimal:
    """Nano units as an amount of the currency."""
    return Decimal(amount_nano) / NANO
