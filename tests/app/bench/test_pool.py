"""`bench pool` on a real Redis of its own."""

import json

from typer.testing import CliRunner

from app.bench.cli import bench_app


def test_both_block_sizes_are_measured_in_both_directions() -> None:
    result = CliRunner().invoke(bench_app, ["pool", "--repeat", "1", "--json"])
    assert result.exit_code == 0, result.output
    speeds = json.loads(result.output)["speeds"]
    assert [speed["block_bytes"] for speed in speeds] == [391_680, 2_097_152]
    for speed in speeds:
        assert speed["publish_ratio"] == speed["publish_bytes_per_s"] / speed["raw_set_bytes_per_s"]
        assert speed["fetch_ratio"] == speed["fetch_bytes_per_s"] / speed["raw_get_bytes_per_s"]


def test_a_redis_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(bench_app, ["pool", "--redis", "redis://127.0.0.1:1"])
    assert result.exit_code == 2
    assert "--redis" in result.output
