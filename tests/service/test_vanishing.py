"""Clients that vanish at random, on the real stack: everything comes back, and the ledger is what was produced."""

import pytest

from app.bench.vanish import VanishOptions, run_vanish
from app.models import catalogue


@pytest.mark.slow
def test_500_streams_whose_clients_vanish_leave_nothing_behind() -> None:
    said: list[str] = []
    result = run_vanish(VanishOptions(entry=catalogue.pull("smollm2-135m"), streams=500), said.append)
    assert [check for check in result["checks"] if not check["holds"]] == []
    # Gateway (5), two workers (5 each), pool (5), ledger and limits (6).
    assert len(result["checks"]) == 26
    made = next(check["found"] for check in result["checks"] if "tokens that workers made" in check["what"])
    assert made > 500
    # A fifth was to stay; so did those whose instant came when their answer was over.
    assert result["ends"]["stayed to the end"] >= 100
