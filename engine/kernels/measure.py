"""What the machine could do at best, measured with the same instructions the kernels use."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from engine.kernels import amx, products, rows
from engine.kernels.isa import Isa, IsaType
from engine.kernels.jit import cgutils, intrinsic, jit, types
from engine.kernels.matmul import DOT_SMALL, PAIRS
from engine.kernels.packing import BLOCK, LANES, Arena, PackedMatrix, aligned, pack, packed_bytes
from engine.kernels.quantised import BY_OCTETS, SUM_BYTES, TILE_ROWS, quantised_bytes
from engine.kernels.simd import I32, I32_LANES, I64, splat
from engine.weights.quantise import NORMED_MEANS
from engine.weights.tensor import Tensor

CHAINS, FEW_CHAINS = 16, 6
"""Independent accumulators: enough to hide the latency of a dot product, and no more than registers hold."""
PEAK_ROUNDS = 200_000
TURNS = 15


@intrinsic
def _dots(context: Any, isa: Any, rounds: Any) -> Any:
    """`rounds` times as many dot products as there are chains, from registers."""
    if not isinstance(isa, IsaType):
        return None
    dot, count = _dot_of(isa.tag), _chains_of(isa.tag)

    def codegen(_c: Any, b: Any, _s: Any, args: Any) -> Any:
        chains = [cgutils.alloca_once_value(b, ir.Constant(I32_LANES, [i] * LANES)) for i in range(count)]
        with cgutils.for_range(b, args[1]) as loop:
            # Differs from round to round and from chain to chain: nothing can be computed once for all.
            quad = splat(b, b.trunc(loop.index, I32), I32_LANES)
            for chain in chains:
                b.store(dot(b, b.load(chain), b.load(chain), quad), chain)
        total = b.load(chains[0])
        for chain in chains[1:]:
            total = b.add(total, b.load(chain))
        return b.sext(b.extract_element(total, ir.Constant(I32, 0)), I64)

    return types.int64(isa, types.int64), codegen


def _dot_of(tag: str) -> Any:
    return PAIRS[tag] if tag in BY_OCTETS else DOT_SMALL[tag]


def _chains_of(tag: str) -> int:
    return CHAINS if tag in ("amx", "vnni") else FEW_CHAINS


@jit
def _dot_rounds(isa: Isa, rounds: int) -> Any:
    return _dots(isa, rounds)


@jit
def _read(words: NDArray[np.uint64]) -> Any:
    mixed = np.uint64(0)
    for start in range(0, words.size - 31, 32):
        for each in range(32):
            mixed ^= words[start + each]
    return mixed


@jit
def _multiply_panels(
    isa: Isa, form: int, num_rows: int, num_panels: int, panels: int, panel_bytes: int, num_blocks: int,
    x: int, sums: int, scales: int, out: int, configs: int, scratch: int,
) -> None:  # fmt: skip
    amx.begin(isa, products.config_of(form), configs)
    for panel in range(num_panels):
        products.multiply(
            isa, num_rows, form, 0, num_rows, panels + panel * panel_bytes, num_blocks, x, sums, scales,
            out + panel * 64, num_panels * 64, 0, scratch,
        )  # fmt: skip
    amx.end(isa)


class Product:
    """A packed matrix times quantised rows on one core, without the rest of a step."""

    def __init__(self, isa: Isa, matrix: PackedMatrix, x: NDArray[np.float32]) -> None:
        num_rows, padded = len(x), -(-len(x) // TILE_ROWS) * TILE_ROWS
        self._isa, self._matrix, self._num_rows = isa, matrix, num_rows
        self._quantised = aligned(quantised_bytes(padded, matrix.num_inputs))
        self._sums = aligned(padded * matrix.num_blocks * SUM_BYTES)
        self._scales = aligned(padded * 4)
        self._out = aligned(padded * matrix.num_panels * 64)
        self._scratch = aligned(products.scratch_bytes(matrix.num_inputs))
        # What lies in working memory must not matter: a step shares it with attention, rows with those before.
        for memory in (self._quantised, self._sums, self._scratch):
            memory[:] = 0x55
        self._configs = aligned(amx.CONFIG_BYTES)
        self._configs.reshape(-1, 64)[:] = amx.tile_configs()
        x = np.ascontiguousarray(x, np.float32)
        for row in range(num_rows):
            at = x[row].ctypes.data
            rows.quantise_row(
                isa, matrix.form, num_rows, row, at, matrix.num_inputs, self._quantised.ctypes.data,
                self._sums.ctypes.data, self._scales.ctypes.data, np.float32(NORMED_MEANS), at,
            )  # fmt: skip

    def run(self) -> NDArray[np.float32]:
        """The product, float32[rows, outputs]; a reused buffer."""
        matrix = self._matrix
        _multiply_panels(
            self._isa, matrix.form, self._num_rows, matrix.num_panels, matrix.data.ctypes.data, matrix.panel_bytes,
            matrix.num_blocks, self._quantised.ctypes.data, self._sums.ctypes.data, self._scales.ctypes.data,
            self._out.ctypes.data, self._configs.ctypes.data, self._scratch.ctypes.data,
        )  # fmt: skip
        out = self._out.view(np.float32).reshape(-1, matrix.num_panels * LANES)
        return out[: self._num_rows, : matrix.num_outputs]


def random_tensor(kind: str, num_outputs: int, num_inputs: int, seed: int) -> Tensor:
    """A random matrix of `kind` ("q4_1", "q4_0", "q8_0" or "f32"), values of the order of 0.1."""
    rng = np.random.default_rng(seed)
    if kind == "f32":
        floats = (0.1 * rng.standard_normal((num_outputs, num_inputs))).astype(np.float32)
        return Tensor("random f32", kind, floats.shape, floats.view(np.uint8).reshape(-1))
    count = num_outputs * num_inputs // BLOCK
    d = (rng.random((count, 1)) * (0.002 if kind == "q8_0" else 0.03) + 0.001).astype(np.float16)
    parts = [d.view(np.uint8)]
    if kind == "q4_1":
        parts.append((d * np.float16(-7.5)).view(np.uint8))
    parts.append(rng.integers(0, 256, (count, 32 if kind == "q8_0" else 16), np.uint8))
    return Tensor(
        f"random {kind}", kind, (num_outputs, num_inputs), np.concatenate(parts, axis=1).reshape(-1)
    )


def dot_peak_ops_per_s(isa: Isa) -> float | None:
    """Operations a second of one core's dot product from registers; None where it is plain code.

    Of bytes, four to a lane; of 16-bit integers, two to a lane, where a machine has no other.
    """
    if isa.name == "portable":
        return None
    return _rounds_ops(isa) / _best_s(lambda: _dot_rounds(isa, PEAK_ROUNDS))


class Reader:
    """Threads that read a buffer of some bytes together, a part each."""

    def __init__(self, num_bytes: int, num_threads: int) -> None:
        words = np.ones(num_bytes // 8, np.uint64)
        self._num_bytes, self._parts = words.nbytes, np.array_split(words, num_threads)
        self._pool = ThreadPoolExecutor(num_threads)
        self._read()

    def bytes_per_s(self, passes: int) -> float:
        """Bytes a second, the median of so many passes."""
        return self._num_bytes / statistics.median(_seconds(self._read) for _ in range(passes))

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()

    def _read(self) -> None:
        list(self._pool.map(_read, self._parts))


def matrix_ops_per_s(
    isa: Isa, kind: str = "f32", num_rows: int = 512, num_inputs: int = 576, num_outputs: int = 1536
) -> float:
    """Operations a second (two a weight and row) of one core's product, activations quantised before.

    `kind`: what the weights come as, see `random_tensor`; "f32" are served as INT8 per channel.
    """
    product = _random_product(isa, kind, num_rows, num_inputs, num_outputs)
    return 2 * num_rows * num_inputs * num_outputs / _best_s(product.run)


def share_of_dot_peak(
    isa: Isa, kind: str = "f32", num_rows: int = 512, num_inputs: int = 576, num_outputs: int = 1536
) -> float | None:
    """What such a product reaches of the dot product's operations a second, the median of `TURNS` in which one follows
    the other: a machine that others use slows both down. None where there is no such peak."""
    if isa.name == "portable":
        return None
    product = _random_product(isa, kind, num_rows, num_inputs, num_outputs)
    ops, peak_ops, shares = 2 * num_rows * num_inputs * num_outputs, _rounds_ops(isa), []
    for _ in range(TURNS):
        peak_s, seconds = _seconds(lambda: _dot_rounds(isa, PEAK_ROUNDS)), _seconds(product.run)
        shares.append(ops / seconds / (peak_ops / peak_s))
    return statistics.median(shares)


def _rounds_ops(isa: Isa) -> int:
    """Operations of `PEAK_ROUNDS` rounds of dot products."""
    return PEAK_ROUNDS * 2 * (2 if isa.name in BY_OCTETS else 4) * LANES * _chains_of(isa.name)


def _random_product(isa: Isa, kind: str, num_rows: int, num_inputs: int, num_outputs: int) -> Product:
    """A product that has been run once."""
    tensor = random_tensor(kind, num_outputs, num_inputs, seed=0)
    matrix = pack([tensor], Arena(packed_bytes([tensor])))
    x = np.random.default_rng(1).standard_normal((num_rows, num_inputs)).astype(np.float32)
    product = Product(isa, matrix, x)
    product.run()
    return product


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _best_s(work: Callable[[], object], repeat: int = 9) -> float:
    """Shortest of some runs: a limit is what the machine does undisturbed."""
    work()
    return min(_seconds(work) for _ in range(repeat))
