"""Faults of the pool under the whole service: no answer fails, none differs by a bit."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis

from app.bench.fault_kinds import FAULTS, Fault, Injury
from app.bench.faults import FaultsOptions, measure_faults
from app.models import catalogue
from tests.memory_pool.conftest import poll
from tests.redis_cluster import Cluster


def check(faults: Sequence[Fault], redis_url: str | None = None) -> None:
    options = FaultsOptions(
        entry=catalogue.pull(catalogue.DEFAULT_MODEL),
        requests=36,
        output_tokens=12,
        faults=faults,
        redis_url=redis_url,
    )
    result = measure_faults(options, lambda _: None)
    # The first row is without a fault. A fault that left no trace raises; the pool must have had hits all along.
    assert [row["fault"] for row in result["rows"]] == ["none", *(fault.name for fault in faults)]
    for row in result["rows"]:
        assert (row["wrong"], row["failed"], row["errors"]) == (0, 0, []), row
        assert row["cached_tokens"] > 0


def test_a_killed_redis_and_damaged_blocks_cost_time_alone() -> None:
    check([FAULTS["redis killed"], FAULTS["bytes flipped"]])


@pytest.mark.slow
def test_no_fault_of_the_pool_costs_an_answer() -> None:
    check(list(FAULTS.values()))


@pytest.mark.slow
def test_a_killed_master_of_a_cluster_costs_no_answer(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)

    def kill(_: Injury) -> None:
        cluster.processes[1].kill()

    def promoted(_: Injury) -> tuple[int, str]:
        with redis.Redis(port=cluster.ports[4]) as replica:
            poll(lambda: replica.info("replication")["role"] == "master", within_s=30)
        return 1, "its replica is a master"

    with contextlib.closing(cluster):
        check([Fault("master killed", kill, promoted)], cluster.url)
