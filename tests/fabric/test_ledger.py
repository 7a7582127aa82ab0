import msgspec
import pytest

from fabric.ledger import DEEPSEEK_R1_KV_BYTES_PER_TOKEN, Ledger, Transfer, price, scaled, total

BLOCK_BYTES = 737_280
"""32 tokens of SmolLM2-135M."""


def test_price_of_a_block_from_the_pool() -> None:
    entry = price("fetch", "cpu:7", "die:3", BLOCK_BYTES, 0.004)
    # read across nodes: 1.7 us for the first 512 B, then 147 GB/s
    assert entry.ub_s == pytest.approx(1.7e-6 + (BLOCK_BYTES - 512) / 147e9)
    # 5 us, 1 us inside the node, then 25 GB/s at 85 %
    assert entry.roce_s == pytest.approx(6e-6 + BLOCK_BYTES / 21.25e9)
    assert entry.measured_s == 0.004


@pytest.mark.parametrize("num_bytes", [0, 1, 64, 23_040, BLOCK_BYTES])
@pytest.mark.parametrize("cpu", ["cpu:0", "cpu:1", "cpu:190"])
def test_ub_is_faster_for_everything_the_service_moves(num_bytes: int, cpu: str) -> None:
    for entry in (price("fetch", cpu, "die:0", num_bytes), price("publish", "die:0", cpu, num_bytes)):
        assert entry.ub_s < entry.roce_s


def test_entries_survive_the_link() -> None:
    entry = price("publish", "die:0", "cpu:1", 10)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=Transfer) == entry


def test_totals_add_up_and_unmeasured_is_not_zero() -> None:
    ledger = Ledger()
    assert ledger.total().measured_s is None
    ledger.add([price("fetch", "cpu:1", "die:0", 10), price("publish", "die:0", "cpu:1", 20)])
    assert ledger.total().measured_s is None
    ledger.add([price("fetch", "cpu:1", "die:0", 30, 0.5), price("fetch", "cpu:1", "die:0", 30, 0.25)])
    parts = ledger.by_kind()
    assert (parts["fetch"].num_transfers, parts["fetch"].num_bytes, parts["fetch"].measured_s) == (
        3,
        70,
        0.75,
    )
    assert parts["publish"].measured_s is None
    whole = ledger.total()
    assert (whole.num_transfers, whole.num_bytes, whole.measured_s) == (4, 90, 0.75)
    assert whole.ub_s == pytest.approx(parts["fetch"].ub_s + parts["publish"].ub_s)


def test_as_if_a_larger_model_had_moved_the_same_tokens() -> None:
    live = price("fetch", "cpu:7", "die:3", BLOCK_BYTES, 0.004)
    as_if = scaled(live, 23_040, DEEPSEEK_R1_KV_BYTES_PER_TOKEN)
    assert as_if.num_bytes == 32 * 70_272
    assert as_if.measured_s is None
    assert as_if.ub_s == price("fetch", "cpu:7", "die:3", 32 * 70_272).ub_s
    assert total([live, as_if]).measured_s == 0.004
