"""The Walsh-Hadamard transform of a head: what is large in a few dims is spread over all of them.

Queries and keys go through it after their rotary positions. It is orthogonal but for a factor, so their products stay
what they were; and 8-bit integers with one scale lose less of a head whose dims are alike. `size` dims are transformed
together.
"""

from typing import Any

from engine.kernels import simd
from engine.kernels.jit import inline

LANES_BYTES = 64


@inline
def size(head_dim: int) -> Any:
    """The largest power of two that divides head_dim: products of transformed vectors are so many times as large."""
    return head_dim & -head_dim


@inline
def transform(source: int, head_dim: int) -> None:
    """A head's floats, in place; head_dim is a multiple of 16."""
    for at in range(0, head_dim * 4, LANES_BYTES):
        x = simd.butterfly(simd.butterfly(simd.load_f32(source + at), 1), 2)
        simd.store_f32(source + at, simd.butterfly(simd.butterfly(x, 4), 8))
    distance = LANES_BYTES
    while distance < size(head_dim) * 4:
        for at in range(0, head_dim * 4, LANES_BYTES):
            if at & distance == 0:
                x, y = simd.load_f32(source + at), simd.load_f32(source + at + distance)
                simd.store_f32(source + at, x + y)
                simd.store_f32(source + at + distance, x - y)
        distance *= 2
