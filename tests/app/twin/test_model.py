from dataclasses import asdict, replace

import pytest

from app.twin import deepseek as r1
from app.twin.compare import compare
from app.twin.fit import fit
from app.twin.parameters import PUBLISHED
from app.twin.predict import predict
from app.twin.prefill import remote_nodes_per_token
from app.twin.scenario import Scenario
from app.twin.validate import validate


def test_sizes_of_the_model_follow_from_its_configuration() -> None:
    # 61 layers x (512 + 64) values x 2 B
    assert r1.KV_BYTES_PER_TOKEN == 70_272
    # 61 layers x 2 x 128 heads x (192 + 128) x 2,048 tokens seen on average: 10.2 GFLOP per token at 4K
    assert pytest.approx(10.2e9, rel=0.01) == 61 * r1.PREFILL_ATTENTION_FLOPS * 2048
    # 61 x 2 x 128 x 1,088 x 4,096: 69.6 GFLOP
    assert pytest.approx(69.6e9, rel=0.01) == 61 * r1.DECODE_ATTENTION_FLOPS * 4096
    assert (r1.experts_per_rank(320), r1.experts_per_rank(32), r1.experts_per_rank(144)) == (1, 10, 3)


def test_the_shipped_parameters_are_the_solution_of_the_six_rows() -> None:
    for name, value in asdict(fit()).items():
        assert getattr(PUBLISHED, name) == pytest.approx(value, rel=1e-4), name


def test_the_error_table_keeps_its_promise() -> None:
    table = validate()
    assert table["num_calibrated"] <= 6
    assert table["num_held_out"] >= 12
    for row in table["rows"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1)
        assert abs(row["error"]) < (1e-4 if row["role"] == "calibrated" else 0.10), row["name"]
    held_out = [abs(r["error"]) for r in table["rows"] if r["role"] == "held_out"]
    assert table["held_out_mean_abs_error"] == pytest.approx(sum(held_out) / len(held_out))
    assert table["held_out_mean_abs_error"] <= 0.05
    assert all(row["reason"] for row in table["exceptions"])


def test_throughput_is_batch_over_tpot_and_grows_with_it() -> None:
    points = [predict(Scenario(batch_per_npu=batch)) for batch in (8, 24, 48, 96)]
    for batch, point in zip((8, 24, 48, 96), points, strict=True):
        assert point["decode_tokens_per_s_per_npu"] == pytest.approx(batch / point["tpot_s"])
    rates = [p["decode_tokens_per_s_per_npu"] for p in points]
    assert rates == sorted(rates)
    assert [p["tpot_s"] for p in points] == sorted(p["tpot_s"] for p in points)


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        ({"plane": "roce"}, "tpot_s"), ({"plane": "roce", "phase": "prefill"}, "ttft_s"), ({"mtp": False}, "tpot_s"),
        ({"microbatch": False}, "tpot_s"), ({"prompt_tokens": 8192}, "tpot_s"), ({"ep": 32}, "tpot_s"),
        ({"tokens_per_npu": 32768}, "ttft_s"), ({"microbatch": False}, "ttft_s"),
    ],
)  # fmt: skip
def test_what_should_cost_time_does(change: dict[str, object], figure: str) -> None:
    base = Scenario(batch_per_npu=64)
    assert predict(replace(base, **change))[figure] > predict(base)[figure]  # type: ignore[arg-type]  # by test table


def test_reuse_and_balance_save_time() -> None:
    base = Scenario(phase="prefill")
    assert predict(replace(base, reuse=0.5))["ttft_s"] < predict(base)["ttft_s"]
    assert predict(replace(base, eplb="perfect"))["ttft_s"] < predict(base)["ttft_s"]


def test_trust_labels_name_what_lies_outside() -> None:
    assert predict(Scenario())["trust"] == {"inside": True, "reasons": []}
    outside = predict(Scenario(batch_per_npu=200, plane="roce"))["trust"]
    assert not outside["inside"]
    assert any("batch_per_npu 200" in reason for reason in outside["reasons"])
    assert any("RoCE" in reason for reason in outside["reasons"])


def test_a_single_lost_switch_chip_is_not_felt_but_a_dark_node_is() -> None:
    base = Scenario()
    one = predict(replace(base, failed="l2:0.0"))
    assert one["fabric_share"] == pytest.approx(111 / 112)
    assert one["tpot_s"] == predict(base)["tpot_s"]
    # one of 112 lanes left: dispatch and combine of 48 tokens would need 1.2 GB/s
    most = ",".join(f"l1:0.{k}" for k in range(6)) + "," + ",".join(f"l1:0.6>l2:6.{c}" for c in range(15))
    assert predict(replace(base, failed=most))["tpot_s"] > 2 * one["tpot_s"]


def test_gpus_have_no_ub_whatever_is_asked() -> None:
    # 90 % of a 4K prompt of 8,192 tokens a rank, over a card of 50 GB/s at 85 %
    h800 = predict(Scenario(hardware="h800", phase="prefill", reuse=0.9, tokens_per_npu=8192))
    assert h800["plane"] == "roce"
    assert h800["pool_load_s"] == pytest.approx(0.9 * 8192 * 70_272 / (0.85 * 50e9))
    compared = compare("hardware=ascend-910c", "hardware=h800", {"batch_per_npu": 64})
    # 287.8 MB: 328 GB/s on UB, 42.5 GB/s on one card
    assert compared["ratio"]["handover_s"] == pytest.approx(328 / 42.5, rel=0.01)


def test_a_token_goes_over_rdma_once_per_node_and_to_four_at_most() -> None:
    assert remote_nodes_per_token(8) == 0
    # two nodes: both are reached but for 2 of 256 cases, one of them is its own
    assert remote_nodes_per_token(16) == pytest.approx(2 * (1 - 2**-8) / 2)
    # 4 x (1 - 0.75^8) = 3.6 nodes, of which three quarters are others
    assert remote_nodes_per_token(32) == pytest.approx(2.7, rel=0.01)
    assert remote_nodes_per_token(320) < 3.6
