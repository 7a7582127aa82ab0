"""Faults of the pool under the whole service: no answer fails, none differs by a bit."""

import pytest

from app.bench.fault_kinds import FAULTS
from app.bench.faults import FaultsOptions, measure_faults
from app.models import catalogue


def check(*faults: str) -> None:
    options = FaultsOptions(
        entry=catalogue.pull(catalogue.DEFAULT_MODEL), requests=36, output_tokens=12, faults=faults
    )
    result = measure_faults(options, lambda _: None)
    # The first row is without a fault. A fault that left no trace raises; the pool must have had hits all along.
    assert [row["fault"] for row in result["rows"]] == ["none", *(faults or FAULTS)]
    for row in result["rows"]:
        assert (row["wrong"], row["failed"], row["errors"]) == (0, 0, []), row
        assert row["cached_tokens"] > 0


def test_a_killed_redis_and_damaged_blocks_cost_time_alone() -> None:
    check("redis killed", "bytes flipped")


@pytest.mark.slow
def test_no_fault_of_the_pool_costs_an_answer() -> None:
    check()
