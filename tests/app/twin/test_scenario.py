import json
from pathlib import Path

import pytest

from app.twin import scenario
from app.twin.errors import TwinError


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bacth_per_npu=8"], "unknown key 'bacth_per_npu'; did you mean 'batch_per_npu'"),
        (["batch_per_npu=many"], "batch_per_npu: 'many' is not a number"),
        (["batch_per_npu=nan"], "batch_per_npu: 'nan' is not a finite number"),
        (["prompt_tokens=1.5"], "prompt_tokens: '1.5' is not a whole number"),
        (["prompt_tokens=0"], "prompt_tokens: 0"),
        (["mtp=maybe"], "mtp: 'maybe'"),
        (["plane=infiniband"], "plane: 'infiniband'"),
        (["model=gpt-5"], "model: 'gpt-5'"),
        (["hardware=tpu"], "hardware: 'tpu'"),
        (["eplb=none"], "eplb: 'none'"),
        (["reuse=1.2"], "reuse: 1.2"),
        (["num_npus=385"], "num_npus: 385"),
        (["num_npus=392"], "num_npus: 392"),
        (["ep=1024"], "ep: 1024"),
        (["ep=8"], "ep: 8 puts"),
        (["batch_per_npu=100000"], "batch_per_npu: 100000 sequences"),
        (["prefill_instances=20"], "prefill_instances: 20"),
        (["decode_instances=0"], "decode_instances: 0"),
        (["failed=l9:1.1"], "failed"),
        (["pool_bytes=-1"], "pool_bytes"),
        (["noequals"], "expected key=value"),
    ],
)
def test_impossible_keys_are_named(words: list[str], named: str) -> None:
    with pytest.raises(TwinError) as caught:
        scenario.from_words(words)
    assert named in str(caught.value)


def test_files_of_both_formats_and_words_on_top(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"batch_per_npu": 8, "mtp": False, "ep": None}))
    (tmp_path / "a.toml").write_text("batch_per_npu = 8\nmtp = false\n")
    a, b = (
        scenario.from_words(["reuse=0.5"], scenario.read(tmp_path / name)) for name in ("a.json", "a.toml")
    )
    assert a == b
    assert (a.batch_per_npu, a.mtp, a.reuse) == (8, False, 0.5)


@pytest.mark.parametrize(
    ("text", "named"), [("{", "bad.json"), ("[1]", "expected an object"), ('{"x": 1}', "'x'")]
)
def test_bad_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(TwinError, match=named):
        scenario.from_mapping(scenario.read(path), str(path))
    with pytest.raises(TwinError, match=r"missing\.json"):
        scenario.read(tmp_path / "missing.json")
