"""The comparison with peers: a peer's process, prompts of exact lengths, our own request, the report."""

import sys
from pathlib import Path
from typing import Any

import pytest

from app.bench.peer_process import PeerError, PeerProcess, find_peers
from app.bench.peer_report import draw, to_markdown
from app.bench.served import make_prompts
from app.models import catalogue
from app.text.tokenizer import Tokenizer

PEER = """
import json, sys
print("noise of a library", file=sys.stderr)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "load":
        answer = {"name": sys.argv[1], "version": "1.2"}
    elif command["do"] == "one":
        answer = {"first_s": 0.5 * len(command["prompt"])}
    elif command["do"] == "fail":
        answer = {"error": "ValueError: too long"}
    else:
        sys.exit("out of memory")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return path


def test_a_peer_answers_fails_and_ends(script: Path) -> None:
    with PeerProcess(Path(sys.executable), "some-engine", script=script) as peer:
        peer.load(Path("model.gguf"), 2)
        assert peer.version == "1.2"
        assert peer.ask("one", prompt=[1, 2, 3]) == {"first_s": 1.5}
        with pytest.raises(PeerError, match="some-engine, fail: ValueError: too long"):
            peer.ask("fail")
        assert peer.ask("one", prompt=[1]) == {"first_s": 0.5}, "an error must not end the peer"
        with pytest.raises(PeerError, match="(?s)ended in `explode`: .*out of memory"):
            peer.ask("explode")


def test_an_interpreter_that_is_not_there_or_has_no_peer(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no-python: No such file"):
        PeerProcess(tmp_path / "no-python", "xllamacpp")
    with pytest.raises(PeerError, match="has no peer .*xllamacpp"):
        find_peers([Path(sys.executable)], {"xllamacpp": tmp_path / "model.gguf"}, 2)


def test_prompts_have_exactly_the_tokens_asked_for() -> None:
    tokenizer = Tokenizer.load(catalogue.pull("smollm2-135m").tokenizer_path)
    prompts = make_prompts(tokenizer, num=40, tokens=256, shared_tokens=192, seed=3)
    assert [tokenizer.encode(text) for text, _ in prompts] == [ids for _, ids in prompts]
    assert {len(ids) for _, ids in prompts} == {256}
    assert len({tuple(ids[:192]) for _, ids in prompts}) == 1
    assert len({tuple(ids[192:224]) for _, ids in prompts}) == 40, "more would be shared than said"


def result() -> dict[str, Any]:
    def side(prefill: float, decode: float) -> dict[str, float]:
        return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}

    def service(speed: float) -> dict[str, float]:
        return {"output_tokens_per_s": speed, "ttft_s": 0.25, "tpot_s": 0.02}

    return {
        "date": "2026-01-02 03:04 UTC",
        "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2", "amx_int8"]},
        "model": "m",
        "threads": 2,
        "repeat": 3,
        "engine_turns": 9,
        "versions": {"openvino-genai": "9.9"},
        "engine": {"cloudmatrix": side(3000, 200), "openvino-genai": side(2000, 250)},
        "served": {"cloudmatrix": service(600), "openvino-genai": service(400)},
    }


def test_the_report_tells_wins_and_losses(tmp_path: Path) -> None:
    text = to_markdown(result())
    assert "A CPU, 2 cores (avx2, amx_int8)" in text
    assert "medians of 9 turns of one request and 3 of the service" in text
    assert "| OpenVINO GenAI | 2000 | 1.50 × | 250 | 0.80 × |" in text  # 3000 / 2000 and 200 / 250
    assert "| OpenVINO GenAI, in process, no HTTP | 400 | 1.50 × | 0.250 s | 20.0 ms |" in text
    draw(result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
