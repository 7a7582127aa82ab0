"""The transform of heads: against the matrix itself."""

from typing import Any

import numpy as np
import pytest

from engine.kernels import hadamard
from engine.kernels.jit import jit
from engine.kernels.packing import aligned


@jit
def _transform(source: int, head_dim: int) -> Any:
    hadamard.transform(source, head_dim)
    return hadamard.size(head_dim)


@pytest.mark.parametrize(("head_dim", "size"), [(32, 32), (64, 64), (96, 32), (128, 128)])
def test_the_transform_is_sylvesters_matrix_of_the_largest_power_of_two(head_dim: int, size: int) -> None:
    """Entry (i, j) of the matrix is -1 to the power of the ones in i & j; every `size` dims go through it."""
    entries = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    head = aligned(head_dim * 4).view(np.float32)
    # Small integers: sums are exact whatever their order.
    head[:] = np.random.default_rng(head_dim).integers(-50, 50, head_dim)
    wanted = np.array(entries) @ head.reshape(-1, size).T
    assert _transform(head.ctypes.data, head_dim) == size
    assert np.array_equal(head.reshape(-1, size), wanted.T)


def test_what_one_dim_holds_is_spread_over_all() -> None:
    """A head with one large dim, 640 beside 1, loses its small dims in 127 steps of the largest; transformed, no dim is
    much larger than another: the largest is at most 640 + 63, the root mean square at least 640."""
    head = aligned(64 * 4).view(np.float32)
    head[:] = 1
    head[17] = 640
    _transform(head.ctypes.data, 64)
    assert np.abs(head).max() / np.sqrt(np.mean(head**2)) < 703 / 640
