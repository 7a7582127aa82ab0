from pathlib import Path

import numpy as np

from app.bench.requantised import quantise_q4_0, requantise
from app.models import catalogue
from engine.weights.gguf import read_gguf
from engine.weights.tensor import Tensor, dequantise


def test_a_block_of_q4_0_by_hand() -> None:
    # The furthest value is -4: scale -4 / -8 = 0.5 (f16 0x3800), so -4 is 0, 0 is 8 and 3.5 is 15; the rest zeros.
    values = np.zeros(32, np.float32)
    values[0], values[1], values[16] = -4.0, 3.5, 1.0
    raw = quantise_q4_0(values)
    # Byte i of the nibbles holds value i low and value i + 16 high: (0, 1.0 / 0.5 + 8 = 10), (15, 8), then (8, 8).
    assert raw.tolist() == [0x00, 0x38, 0xA0, 0x8F, *[0x88] * 14]


def test_the_default_model_in_q4_0_reads_back_with_close_weights(tmp_path: Path) -> None:
    source = catalogue.pull(catalogue.DEFAULT_MODEL).path
    requantise(source, tmp_path / "q4_0.gguf")
    before, after = read_gguf(source), read_gguf(tmp_path / "q4_0.gguf")
    assert after.metadata == before.metadata
    assert list(after.tensors) == list(before.tensors)
    kinds = {(before.tensors[name].kind, tensor.kind) for name, tensor in after.tensors.items()}
    assert ("q4_1", "q4_0") in kinds
    assert not any(new == "q4_1" for _, new in kinds)
    one, other = (
        dequantise(Tensor("x", raw.kind, raw.shape, raw.data))
        for raw in (file.tensors["blk.7.ffn_up.weight"] for file in (before, after))
    )
    # Four bits a weight: half a step of at most an eighth of a block's largest value.
    assert 0 < np.abs(one - other).max() <= np.abs(one).max() / 8
