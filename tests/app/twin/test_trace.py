from pathlib import Path

import pytest

from app.twin.errors import TwinError
from app.twin.pool import TwinPool, ideal_hit_share
from app.twin.trace import Request, read
from tests.app.twin.small_trace import write_trace

GOOD = '{"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'


def test_mooncake_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + "\n" + GOOD.replace("1000", "3000") + "\n")
    assert read(path) == [Request(0.0, 600, 5, (1, 2)), Request(2.0, 600, 5, (1, 2))]
    assert read(path, speedup=4)[1].arrival_s == 0.5


def test_azure_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,9,1\n"
    )
    assert read(path) == [Request(0.0, 374, 44, ()), Request(pytest.approx(0.5), 9, 1, ())]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"timestamp": 1000, "input_length": 5}', "line 2: key 'output_length' is missing"),
        (GOOD.replace("600", "0"), "line 2: key 'input_length'"),
        (GOOD.replace("600", '"many"'), "line 2: key 'input_length'"),
        (GOOD.replace("1000", "-1"), "line 2: key 'timestamp'"),
        (GOOD.replace("[1, 2]", "[1, 2, 3]"), "line 2: key 'hash_ids' has 3 blocks"),
        (GOOD.replace("[1, 2]", '["a"]'), "line 2: key 'hash_ids'"),
        (GOOD.replace("1000", "999"), "line 2: arrives before"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: str, named: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + "\n" + bad + "\n")
    with pytest.raises(TwinError) as caught:
        read(path)
    assert named in str(caught.value)
    assert "t.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("2023,1,1", "TIMESTAMP '2023'"),
        ("2023-11-16 18:15:46,1", "2 columns"),
        ("2023-11-16 18:15:46,x,1", "ContextTokens"),
    ],
)
def test_bad_azure_rows_are_named(tmp_path: Path, row: str, named: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{row}\n")
    with pytest.raises(TwinError, match=f"line 2: .*{named}"):
        read(path)


def test_empty_and_missing_traces(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(TwinError, match="no requests"):
        read(tmp_path / "empty")
    with pytest.raises(TwinError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_ideal_hits_by_hand() -> None:
    requests = [Request(0, 1024, 1, (1, 2)), Request(1, 1300, 1, (1, 2, 3)), Request(2, 700, 1, (9, 2))]
    # the second finds two blocks, 1,024 of its 1,300 tokens; the third finds none: its first block is new
    assert ideal_hit_share(requests, 10, None) == pytest.approx(1024 / (1024 + 1300 + 700))
    # room for one block: the second finds block 2 only, which is not its first
    assert ideal_hit_share(requests, 10, 10) == 0


def test_the_pool_lets_the_least_recently_used_go() -> None:
    pool = TwinPool(10, 30)
    pool.publish([1, 2, 3], 0.0)
    assert pool.lookup([1]) == 1
    pool.publish([4], 1.0)
    assert (pool.lookup([2]), pool.lookup([1, 3]), pool.num_evicted, pool.used_bytes) == (0, 2, 1, 30)


def test_the_synthetic_trace_is_a_trace(tmp_path: Path) -> None:
    requests = read(write_trace(tmp_path / "t.jsonl", 50))
    assert len(requests) == 50
    assert 0 < ideal_hit_share(requests, 1, None) < 1
