import pytest

from fabric.collectives import all_gather_s, all_to_all_s, moe_exchange, payload_bytes, table_latency_s
from fabric.gpu_cluster import GPUCluster
from fabric.topology import FabricError


@pytest.mark.parametrize(
    ("operator", "ep", "cann_us", "deepep_us"),
    [
        ("dispatch", 8, 116, 163),
        ("dispatch", 256, 152, 194),
        ("combine", 32, 146, 350),
        ("combine", 128, 150, 369),
    ],
)
def test_measured_latencies_come_out(operator: str, ep: int, cann_us: float, deepep_us: float) -> None:
    assert moe_exchange(operator, 128, ep).seconds == pytest.approx(cann_us * 1e-6)  # type: ignore[arg-type]
    assert table_latency_s(operator, ep, "deepep") == pytest.approx(deepep_us * 1e-6)  # type: ignore[arg-type]


def test_between_rows_the_latency_follows_log2_and_stays_flat_beyond() -> None:
    # 64 = 2^6 lies halfway between 32 and 128
    assert table_latency_s("dispatch", 64) == pytest.approx((133e-6 + 152e-6) / 2)
    assert table_latency_s("dispatch", 320) == table_latency_s("dispatch", 256)
    with pytest.raises(FabricError, match="ep: 1"):
        table_latency_s("dispatch", 1)


def test_payload_of_128_tokens() -> None:
    assert payload_bytes("dispatch", 128) == 128 * 8 * 7680
    assert payload_bytes("combine", 128) == 128 * 8 * 14336


def test_on_roce_the_link_bounds_the_exchange() -> None:
    ub, roce = moe_exchange("combine", 128, 256), moe_exchange("combine", 128, 256, plane="roce")
    assert (ub.bound, roce.bound) == ("operator", "link")
    assert roce.seconds == pytest.approx(5e-6 + 14_680_064 / 21.25e9)


def test_unfused_dispatch_is_slower_and_fewer_tokens_are_faster_down_to_the_fixed_share() -> None:
    assert (
        moe_exchange("dispatch", 128, 32, fused=False).seconds
        > 1.8 * moe_exchange("dispatch", 128, 32).seconds
    )
    assert moe_exchange("dispatch", 32, 32, fixed_share=0.4).seconds == pytest.approx(
        133e-6 * (0.4 + 0.6 / 4)
    )


def test_all_to_all_and_all_gather() -> None:
    # 31 parts of 1 MB leave a die at 135 GB/s
    assert all_to_all_s(1e6, 32) == pytest.approx(2.1e-6 + 31e6 / 135e9)
    assert all_gather_s(1e6, 32, plane="roce") == pytest.approx(5e-6 + 31e6 / 21.25e9)
    with pytest.raises(FabricError, match="plane"):
        all_to_all_s(1, 2, plane="vpc")


def test_a_gpu_cluster_is_fast_inside_a_node_and_slow_between() -> None:
    cluster = GPUCluster(16)
    # 158 GB/s over NVLink against 42.5 GB/s over the card
    assert cluster.transfer_time(0, 7, 10**9) == pytest.approx(1e9 / 158e9 + 1e-6)
    assert cluster.transfer_time(0, 8, 10**9) == pytest.approx(1e9 / 42.5e9 + 5e-6)
    with pytest.raises(FabricError, match="gpu:16"):
        cluster.transfer_time(0, 16, 1)
    with pytest.raises(FabricError, match="num_gpus: 12"):
        GPUCluster(12)
