import json
from pathlib import Path

import pytest

from memory_pool.replay import ideal_share, num_distinct, read_chains, replay


def write_trace(path: Path, chains: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": chain}) + "\n" for chain in chains))
    return path


def test_the_ideal_counts_leading_blocks_seen_before() -> None:
    # Of 9 blocks: 0 of the first 3; 2 of the second 3 (0, 1); 2 of the third 3 (0, 1): 5 is not behind 9.
    assert ideal_share([[0, 1, 2], [0, 1, 9], [0, 1, 7]]) == pytest.approx(4 / 9)
    assert ideal_share([]) == 0


def test_the_disk_tier_holds_what_dram_cannot() -> None:
    # 60 chains of 10 blocks, each played twice in the same order: LRU over 150 blocks has lost each chain by its second
    # turn, the disk (1,500 blocks) has all: half of all blocks can be found.
    chains = [list(range(number * 10, number * 10 + 10)) for number in range(60)] * 2
    assert ideal_share(chains) == 0.5
    assert num_distinct(chains) == 600
    turns: list[None] = []
    dram, wrong = replay(chains, dram_blocks=150, disk_blocks=0, played=lambda: turns.append(None))
    assert dram < 0.15
    both, also_wrong = replay(chains, dram_blocks=150, disk_blocks=1500)
    assert both > 0.45
    assert wrong == also_wrong == 0
    assert len(turns) == 120


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace", [[1]])
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match="line 2"):
        read_chains(path, 10)
