"""What a worker claims of a shared processor, by what it computes."""

from dataclasses import dataclass
from pathlib import Path

from engine.courtesy import DECODE_NICENESS, LONG_NICENESS, LONG_TOKENS, Courtesy


@dataclass
class Prompt:
    num_tokens: int
    local_tokens: int = 0
    fetched_tokens: int = 0


def test_first_tokens_go_first_then_running_answers_then_long_prompts(tmp_path: Path) -> None:
    group = tmp_path / "autogroup"
    group.write_text("")
    courtesy = Courtesy(group)
    long, short = Prompt(2000), Prompt(64)
    courtesy.before([short], 0)
    assert group.read_text() == "", "nothing is written when nothing changes"
    courtesy.before([long], 0)
    assert group.read_text() == str(LONG_NICENESS)
    courtesy.before([long, short], 0)
    assert group.read_text() == "0", "somebody waits for a first token"
    courtesy.before([], 3)
    assert group.read_text() == str(DECODE_NICENESS)
    courtesy.before([short], 3)
    assert group.read_text() == "0"
    courtesy.before([long], 1)
    assert group.read_text() == str(DECODE_NICENESS), "somebody reads along"
    # 2000 - 1000 - (1000 - LONG_TOKENS) = LONG_TOKENS tokens are left to compute, then one less.
    courtesy.before([Prompt(2000, 1000, 1000 - LONG_TOKENS)], 0)
    assert group.read_text() == str(LONG_NICENESS)
    courtesy.before([Prompt(2000, 1000, 1001 - LONG_TOKENS)], 0)
    assert group.read_text() == "0"


def test_a_refused_change_is_tried_again(tmp_path: Path) -> None:
    group = tmp_path / "later" / "autogroup"
    courtesy = Courtesy(group)
    courtesy.before([Prompt(2000)], 0)
    group.parent.mkdir()
    courtesy.before([Prompt(2000)], 0)
    assert group.read_text() == str(LONG_NICENESS)
