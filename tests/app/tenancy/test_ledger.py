import pytest

from app.tenancy.ledger import day_of


@pytest.mark.parametrize(
    ("instant", "day"),
    [
        (0.0, "1970-01-01"),
        (86_399.999, "1970-01-01"),
        (86_400.0, "1970-01-02"),
        (1_796_774_400.5, "2026-12-09"),
    ],
)
def test_a_day_begins_at_midnight_utc(instant: float, day: str) -> None:
    assert day_of(instant) == day
