import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.twin.cli import twin_app
from app.twin.fabric_cli import fabric_app
from tests.app.twin.small_trace import write_trace

runner = CliRunner()


def test_fabric_transfer_prints_the_contract() -> None:
    words = ["transfer", "--src", "npu:0", "--dst", "npu:383", "--bytes", "287834112", "--json"]
    found = json.loads(runner.invoke(fabric_app, words).stdout)
    assert {"num_bytes", "ub_s", "roce_s", "vpc_s", "path"} <= found.keys()
    assert found["ub_s"] < found["roce_s"] < found["vpc_s"]
    shared = json.loads(runner.invoke(fabric_app, [*words, "--beside", "npu:0,npu:200"]).stdout)[
        "shared_ub_s"
    ]
    # both go out of one package at 392 GB/s together
    assert shared == pytest.approx([2 * 287_834_112 / 392e9] * 2, rel=0.01)
    table = runner.invoke(fabric_app, [*words[:-1], "--beside", "npu:0,npu:200,bulk"])
    assert "shared" in table.stdout
    assert table.exit_code == 0
    assert "roce" in table.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--src", "npu:0", "--dst", "npu:384", "--bytes", "1"], "npu:384"),
        (["--src", "npu:0", "--dst", "gpu:1", "--bytes", "1"], "gpu:1"),
        (["--src", "npu:0", "--dst", "npu:1", "--bytes", "-1"], "num_bytes"),
        (["--src", "npu:0", "--dst", "npu:1", "--bytes", "1", "--npus", "385"], "num_npus"),
        (["--src", "npu:0", "--dst", "npu:1", "--bytes", "1", "--failed", "l3:1.1"], "l3:1.1"),
        (["--src", "npu:0", "--dst", "npu:1", "--bytes", "1", "--beside", "npu:0"], "place ''"),
        (["--src", "npu:0", "--dst", "npu:1", "--bytes", "1", "--beside", "npu:0,npu:9,gold"], "'gold'"),
    ],
)
def test_fabric_refuses_by_name(words: list[str], named: str) -> None:
    result = runner.invoke(fabric_app, ["transfer", *words])
    assert result.exit_code == 2
    assert named in result.stderr


def test_the_published_fabric_comes_back() -> None:
    found = json.loads(runner.invoke(fabric_app, ["validate", "--json"]).stdout)
    assert found["largest_error"] < 1e-9
    table = runner.invoke(fabric_app, ["validate"])
    assert table.exit_code == 0
    assert "UB NPU to NPU" in table.stdout


def test_dispatch_and_combine_by_ep_degree() -> None:
    found = json.loads(runner.invoke(fabric_app, ["exchange", "--ep", "256", "--json"]).stdout)["rows"]
    dispatch, combine = found
    # Table 6; over a die's card 128 x 8 x 7,680 B at 25 GB/s x 85 % take 370 us and 5 of latency
    assert dispatch["UB, fused"] == {"seconds": pytest.approx(152e-6), "bound": "operator"}
    assert combine["H800, DeepEP"]["seconds"] == pytest.approx(360e-6, rel=0.01)
    assert dispatch["RoCE, fused"] == {"seconds": pytest.approx(375e-6, rel=0.01), "bound": "link"}
    assert dispatch["UB, not fused"]["seconds"] > 1.5 * dispatch["UB, fused"]["seconds"]
    assert runner.invoke(fabric_app, ["exchange", "--tokens", "16"]).exit_code == 0
    refused = runner.invoke(fabric_app, ["exchange", "--ep", "1"])
    assert (refused.exit_code, "ep: 1" in refused.stderr) == (2, True)


def test_a_larger_pool_finds_more_and_every_prediction_has_its_label(tmp_path: Path) -> None:
    trace = str(write_trace(tmp_path / "t.jsonl", 80))
    words = ["compare", "pool_bytes=1e9", "pool_bytes=1e12", "--trace", trace, "--json"]
    compared = json.loads(runner.invoke(twin_app, words).stdout)
    assert compared["ratio"]["cache_hit_token_share"] < 1
    labels = [side[key] for side in compared["sides"].values() for key in ("trust", "trust_of_replay")]
    labels.append(json.loads(runner.invoke(twin_app, ["predict", "--json"]).stdout)["trust"])
    labels.append(json.loads(runner.invoke(twin_app, ["replay", "--trace", trace, "--json"]).stdout)["trust"])
    answers = json.loads(
        runner.invoke(twin_app, ["recommend", "--trace", trace, "--slo-tpot", "0.05", "--json"]).stdout
    )
    labels.append(answers["answers"][0]["trust"])
    assert all(label["inside"] == (not label["reasons"]) for label in labels)
    for words in (["replay", "--trace", trace], ["compare", "ub", "roce"], ["recommend", "--trace", trace]):
        assert "the range that published" in runner.invoke(twin_app, words, env={"COLUMNS": "200"}).stdout


def test_every_answer_is_one_json_object(tmp_path: Path) -> None:
    trace = str(write_trace(tmp_path / "t.jsonl", 80))
    keys = {
        ("validate",): {"rows", "held_out_mean_abs_error", "held_out_max_abs_error"},
        ("predict", "--set", "phase=prefill", "--set", "reuse=0.5"): {
            "prefill_tokens_per_s_per_npu", "decode_tokens_per_s_per_npu", "ttft_s", "tpot_s",
        },
        ("replay", "--trace", trace): {
            "requests", "completed", "sim_duration_s", "wall_s", "requests_per_wall_s", "ttft_s", "tpot_s",
            "cache_hit_token_share", "throughput",
        },
        ("replay", "--trace", trace, "--fail", "prefill:1@9-20", "--fail", "l2:0.0@10"): {"faults", "without_faults"},
        ("replay", "--trace", trace, "--autoscale", "--set", "decode_npus=16"): {"role_changes", "without_autoscale"},
        ("recommend", "--trace", trace, "--slo-tpot", "0.05"): {"answers"},
        ("compare", "ub", "roce"): {"ratio"},
        ("compare", "pool_bytes=1e9", "pool_bytes=1e12", "--trace", trace): {"ratio"},
        ("report", "--out", str(tmp_path / "r.html")): {"report"},
    }  # fmt: skip
    for words, expected in keys.items():
        result = runner.invoke(twin_app, [*words, "--json"])
        assert result.exit_code == 0, result.stderr
        assert expected <= json.loads(result.stdout).keys()
        assert runner.invoke(twin_app, list(words)).exit_code == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["predict", "--set", "plan=ub"], "'plan'"),
        (["predict", "--scenario", "/nowhere.json"], "/nowhere.json"),
        (["replay", "--trace", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["replay", "--trace", "t.jsonl", "--fail", "decode:1@5"], "decode:0"),
        (["replay", "--trace", "t.jsonl", "--fail", "decode:0"], "WHAT@START"),
        (["replay", "--trace", "t.jsonl", "--autoscale"], "decode_npus"),
        (["replay", "--trace", "TRACE", "--fail", "pool:0@1", "--profile", "p.json"], "--profile"),
        (["compare", "ub", "ub"], "both sides"),
        (["compare", "ub", "num_npus=400"], "num_npus: "),
        (
            ["live", "--base-url", "http://127.0.0.1:9", "--model", "m", "--profile", "/nowhere.json"],
            "/nowhere.json",
        ),
        (["calibrate", "--base-url", "http://127.0.0.1:9", "--model", "m"], "127.0.0.1:9"),
    ],
)
def test_the_twin_refuses_by_name(words: list[str], named: str, tmp_path: Path) -> None:
    trace = str(write_trace(tmp_path / "t.jsonl", 3))
    result = runner.invoke(twin_app, [trace if word == "TRACE" else word for word in words])
    assert result.exit_code == 2
    assert named in result.stderr
