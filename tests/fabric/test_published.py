import pytest

from fabric.published import KV_4K_BYTES, LINE_RATE_S, validate_fabric


def test_every_published_figure_comes_back() -> None:
    found = validate_fabric()
    # eight paths with a latency and a bandwidth each, five sizes with switches and their use
    assert len(found["rows"]) == 8 * 2 + 5 * 2
    assert found["largest_error"] < 1e-9
    by_name = {row["what"]: row["modelled"] for row in found["rows"]}
    assert by_name["UB NPU to NPU, read, between nodes: bandwidth"] == pytest.approx(164)
    assert by_name["UB NPU to CPU, write, inside a node: 512 B"] == pytest.approx(1.1)
    assert by_name["352 NPUs: use of the switches"] == 0.92


def test_the_handover_of_4k_tokens_by_hand() -> None:
    handover = validate_fabric()["handover_4k"]
    assert KV_4K_BYTES == 287_834_112
    # at line rate: 2 x 196 GB/s, 2 x 25 GB/s, 50 / 8 GB/s; a real UB read moves 164 of 196 GB/s a die, RDMA 85 %
    assert LINE_RATE_S["ub"] == pytest.approx(KV_4K_BYTES / 392e9, rel=1e-3)
    assert LINE_RATE_S["roce"] == pytest.approx(KV_4K_BYTES / 50e9, rel=1e-3)
    assert LINE_RATE_S["vpc"] == pytest.approx(KV_4K_BYTES / 6.25e9, rel=1e-3)
    assert handover["modelled_s"]["ub"] == pytest.approx(KV_4K_BYTES / 328e9, rel=0.01)
    assert handover["modelled_s"]["roce"] == pytest.approx(KV_4K_BYTES / 42.5e9, rel=0.01)
    assert handover["ub_faster_than"]["roce"] == pytest.approx(7.7, rel=0.01)
