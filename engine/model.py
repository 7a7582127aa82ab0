"""The transformer as the worker sees it: a step over rows of many sequences, logits out.

A row's result does not depend on what else is in the step, on how its sequence was cut into steps, nor on the number of
threads: bit for bit.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.config import KVLayout, ModelConfig
from engine.kernels import Progress, amx, choose, products, step, warm
from engine.kernels.attention import TILE_POSITIONS, scratch_bytes
from engine.kernels.packing import LANES, Arena, PackedMatrix, aligned, pack, packed_bytes
from engine.kernels.quantised import SUM_BYTES, TILE_ROWS, quantised_bytes
from engine.kernels.team import Team
from engine.kv_cache import KVCache
from engine.weights import ModelWeights, load_weights
from engine.weights.quantise import quantise_q8_0
from engine.weights.tensor import Tensor, dequantise

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

NUMERICS = "a12-row-a8-outliers-4-6-8/w4-factored-w8-channel/i8-kv-hadamard-q8-p8/1"
"""Changes whenever the same weights and tokens would give other bits."""


@dataclass(slots=True)
class StepBatch:
    """Rows of S sequences, laid one after another; T rows in all. All arrays int32.

    `tokens` [T]; `query_start` [S+1]: sequence s has the rows query_start[s]..query_start[s+1]; `first_position` [S]:
    position of its first row; `block_tables` [S, B]: its block ids, enough for every position up to its last row;
    `logit_rows` [R]: rows whose logits are wanted, R may be 0.
    """

    tokens: I32
    query_start: I32
    first_position: I32
    block_tables: I32
    logit_rows: I32


class Model:
    """Packed weights, buffers and threads. One thread at a time calls `forward`."""

    config: ModelConfig
    fingerprint: str
    """Hex digest of weights, numerics and KV layout: equal fingerprints compute equal KV."""

    def __init__(
        self,
        weights: ModelWeights,
        *,
        num_threads: int,
        kernels: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        """Compile or load the kernels, pack `weights` and start the threads.

        Raises ValueError naming the field or tensor that the kernels cannot serve.
        """
        if num_threads < 1:
            raise ValueError(f"num_threads: {num_threads}, expected at least 1")
        check_shape(weights.config)
        self.config = weights.config
        self.isa = choose(kernels)
        warm(progress, self.isa)
        self.layout = KVLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
        )
        self.fingerprint = hashlib.sha256(f"{weights.digest}|{NUMERICS}|{self.layout}".encode()).hexdigest()
        self.num_threads = num_threads
        self._plan = aligned((step.PLAN_WORDS + 1) * 8).view(np.int64)
        self._held: dict[str, NDArray[np.uint8]] = {}
        self._num_rows = self._num_logits = self._num_angles = 0
        self._pack(weights)
        self._team = Team(num_threads, self._help)
        self._set_constants()
        self._team.start()

    @classmethod
    def load(
        cls, path: Path, *, num_threads: int, kernels: str = "auto", progress: Progress | None = None
    ) -> "Model":
        """A model from its file. Raises ModelFileError for a bad file, ValueError for a shape not served."""
        return cls(load_weights(path), num_threads=num_threads, kernels=kernels, progress=progress)

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed matrices: what one decode step reads."""
        return sum(matrix.data.nbytes for matrix in self._matrices)

    def new_cache(self, num_blocks: int) -> KVCache:
        """An empty cache of this model's layout."""
        return KVCache(self.layout, num_blocks)

    def forward(self, batch: StepBatch, cache: KVCache) -> F32:
        """Compute all rows, write their KV to `cache`, return float32[R, vocab] of the wanted rows.

        The result is a reused buffer, valid until the next call. Releases the GIL. Raises ValueError when the batch
        does not fit together, its tokens the vocabulary, its blocks the cache or its positions the context.
        """
        positions, row_blocks, attention_tiles, tables = self._layout_rows(batch, cache)
        num_rows, num_logits = len(batch.tokens), len(batch.logit_rows)
        tokens = np.ascontiguousarray(batch.tokens, np.int32)
        logit_rows = np.ascontiguousarray(batch.logit_rows, np.int32)
        if num_rows == 0:
            return np.empty((0, self.config.vocab_size), np.float32)
        self._reserve(num_rows, num_logits, int(positions.max()) + 1)
        plan = self._plan
        plan[step.CACHE] = cache.blocks.ctypes.data
        plan[step.BLOCK_BYTES] = cache.layout.block_bytes
        plan[step.NUM_ROWS] = num_rows
        plan[step.TOKENS] = tokens.ctypes.data
        plan[step.POSITIONS] = positions.ctypes.data
        plan[step.ROW_BLOCKS] = row_blocks.ctypes.data
        plan[step.NUM_LOGIT_ROWS] = num_logits
        plan[step.LOGIT_ROWS] = logit_rows.ctypes.data
        plan[step.NUM_TILES] = len(attention_tiles)
        plan[step.TILES] = attention_tiles.ctypes.data
        # The plan points into these.
        self._batch_arrays = (tokens, positions, row_blocks, logit_rows, attention_tiles, tables)
        step.run_step(self.isa, self._plan_address)
        # A chunk in the middle of a prompt: the very first step has no buffer for logits yet.
        if num_logits == 0:
            return np.empty((0, self.config.vocab_size), np.float32)
        logits = self._held["logits"].view(np.float32).reshape(-1, self._logits_stride)
        return logits[:num_logits, : self.config.vocab_size]

    def close(self) -> None:
        """Stop the threads. The model cannot be used afterwards."""
        self._team.stop()

    def _help(self, worker: int) -> None:
        step.take_part(self.isa, self._plan_address, worker)

    def _layout_rows(self, batch: StepBatch, cache: KVCache) -> tuple[I32, I32, NDArray[np.int64], I32]:
        """Position and block of each row, the attention tiles, and the table they point into."""
        num_rows, config = len(batch.tokens), self.config
        starts = np.asarray(batch.query_start, np.int64)
        counts = np.diff(starts)
        if starts[0] != 0 or starts[-1] != num_rows or (counts < 0).any():
            raise ValueError(f"query_start: {batch.query_start.tolist()} does not cut {num_rows} rows")
        sequence = np.repeat(np.arange(len(counts)), counts)
        firsts = np.asarray(batch.first_position, np.int64)
        positions = (np.arange(num_rows) - starts[:-1][sequence] + firsts[sequence]).astype(np.int32)
        tables = np.ascontiguousarray(batch.block_tables, np.int32)
        if num_rows:
            if positions.min() < 0 or positions.max() >= config.max_context_tokens:
                raise ValueError(
                    f"first_position: rows beyond the context of {config.max_context_tokens} tokens"
                )
            if batch.tokens.min() < 0 or batch.tokens.max() >= config.vocab_size:
                raise ValueError(f"tokens: ids outside 0..{config.vocab_size - 1}")
            if positions.max() // self.layout.block_tokens >= tables.shape[1]:
                raise ValueError(
                    f"block_tables: {tables.shape[1]} blocks a sequence do not hold all positions"
                )
        if len(batch.logit_rows) and not 0 <= batch.logit_rows.min() <= batch.logit_rows.max() < num_rows:
            raise ValueError(f"logit_rows: outside 0..{num_rows - 1}")
        if cache.layout != self.layout:
            raise ValueError(f"cache: layout {cache.layout}, this model's is {self.layout}")
        found: list[tuple[int, int, int, int]] = []
        base, width = tables.ctypes.data, tables.shape[1]
        for s, count in enumerate(counts.tolist()):
            if not count:
                continue
            used = tables[s, : (int(firsts[s]) + count - 1) // self.layout.block_tokens + 1]
            if used.min() < 0 or used.max() >= cache.num_blocks:
                raise ValueError(
                    f"block_tables: sequence {s} names a block outside 0..{cache.num_blocks - 1}"
                )
            found += [
                (
                    int(starts[s]) + at,
                    min(TILE_POSITIONS, count - at),
                    int(firsts[s]) + at,
                    base + s * width * 4,
                )
                for at in range(0, count, TILE_POSITIONS)
            ]
        row_blocks = np.ascontiguousarray(tables[sequence, positions // self.layout.block_tokens])
        return positions, row_blocks, np.array(found, np.int64).reshape(-1, step.TILE_WORDS), tables

    def _hold(self, name: str, num_bytes: int) -> int:
        """A buffer that lives as long as the model (or until it is asked for again); its address."""
        self._held.pop(name, None)
        self._held[name] = aligned(num_bytes)
        return int(self._held[name].ctypes.data)

    def _reserve(self, num_rows: int, num_logits: int, num_positions: int) -> None:
        """Grow the working memory to this step's size."""
        config, plan = self.config, self._plan
        num_rows = -(-num_rows // TILE_ROWS) * TILE_ROWS
        if num_rows > self._num_rows:
            self._num_rows = num_rows
            heads_width = config.num_heads * config.head_dim
            qkv_width = heads_width + 2 * config.num_kv_heads * config.head_dim
            widest = max(config.hidden_size, heads_width, config.intermediate_size)
            # Scales, sums and the rows themselves also serve the rows that want logits: never more than these.
            plan[step.HIDDEN_ROWS] = self._hold("hidden", num_rows * config.hidden_size * 4)
            plan[step.QKV] = self._hold("qkv", num_rows * qkv_width * 4)
            plan[step.MIXED] = self._hold("mixed", num_rows * heads_width * 4)
            plan[step.GATED] = self._hold("gated", num_rows * config.intermediate_size * 4)
            plan[step.QUANTISED] = self._hold("quantised", quantised_bytes(num_rows, widest))
            plan[step.SUMS] = self._hold("sums", num_rows * widest // 32 * SUM_BYTES)
            plan[step.SCALES] = self._hold("scales", num_rows * 4)
        if num_logits > self._num_logits:
            self._num_logits = num_logits
            plan[step.LOGITS] = self._hold("logits", num_logits * self._logits_stride * 4)
            plan[step.LAST_ROWS] = self._hold("last", num_logits * config.hidden_size * 4)
        if num_positions > self._num_angles:
            self._num_angles = min(max(2 * num_positions, 2048), config.max_context_tokens)
            angles = rotation_table(config, self._num_angles)
            address = self._hold("angles", angles.nbytes)
            self._held["angles"].view(np.float32)[:] = angles.ravel()
            plan[step.ANGLES] = address

    def _pack(self, weights: ModelWeights) -> None:
        config, tensors = self.config, weights.tensors
        parts = [_serve([tensors[name] for name in names]) for names in _matrix_names(config)]
        arena = Arena(sum(packed_bytes(part) for part in parts))
        # Each source goes when its packed copy stands, so that converted weights never all exist twice.
        self._matrices: list[PackedMatrix] = []
        parts.reverse()
        while parts:
            part = parts.pop()
            self._matrices.append(pack(part, arena, interleave=part[0].name.endswith("ffn_gate")))
        num_ends = 1 if config.tied_embeddings else 2
        self._ends = np.array([_record(self._matrices[0]), _record(self._matrices[num_ends - 1])], np.int64)
        self._logits_stride = self._matrices[num_ends - 1].num_panels * LANES
        self._records = np.zeros((config.num_layers, step.LAYER_WORDS), np.int64)
        for layer, record in enumerate(self._records):
            matrices = self._matrices[num_ends + 4 * layer : num_ends + 4 * layer + 4]
            record[: 4 * step.MATRIX_WORDS] = [word for matrix in matrices for word in _record(matrix)]
            record[step.ATTENTION_NORM] = self._hold_vector(tensors[f"blk.{layer}.attn_norm"])
            record[step.FEED_FORWARD_NORM] = self._hold_vector(tensors[f"blk.{layer}.ffn_norm"])
        self._plan[step.OUTPUT_NORM] = self._hold_vector(tensors["output_norm"])

    def _hold_vector(self, tensor: Tensor) -> int:
        address = self._hold(tensor.name, tensor.num_elements * 4)
        self._held[tensor.name].view(np.float32)[:] = dequantise(tensor)
        return address

    def _set_constants(self) -> None:
        config, plan = self.config, self._plan
        plan[step.NUM_LAYERS], plan[step.HIDDEN] = config.num_layers, config.hidden_size
        plan[step.HEADS], plan[step.KV_HEADS] = config.num_heads, config.num_kv_heads
        plan[step.HEAD_DIM], plan[step.INTERMEDIATE] = config.head_dim, config.intermediate_size
        plan[step.EMBEDDING] = self._ends[0].ctypes.data
        plan[step.HEAD] = self._ends[1].ctypes.data
        plan[step.LAYERS] = self._records.ctypes.data
        plan[step.THREADS], plan[step.FUTEX] = self.num_threads, self._team.futex_call
        plan[step.CONTROL] = self._team.address
        plan[step.TILE_CONFIGS] = self._hold("tile configs", amx.CONFIG_BYTES)
        self._held["tile configs"].reshape(-1, 64)[:] = amx.tile_configs()
        plan[step.LOGITS_STRIDE] = self._logits_stride * 4
        attention = scratch_bytes(config.num_heads // config.num_kv_heads, config.head_dim)
        widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
        matrix = step.GATE_UP_BYTES + products.scratch_bytes(widest)
        normed = config.hidden_size * 4
        stride = -(-max(attention, matrix, normed) // 4096) * 4096
        plan[step.SCRATCH_STRIDE] = stride
        plan[step.SCRATCH] = self._hold("scratch", stride * self.num_threads)
        plan[step.PLAN_WORDS :].view(np.float32)[:] = (config.rms_norm_eps, config.head_dim**-0.5)

    @property
    def _plan_address(self) -> int:
        return int(self._plan.ctypes.data)


def check_shape(config: ModelConfig) -> None:
    """Raise ValueError, naming the field, when the kernels cannot serve this shape."""
    for field, unit in (("hidden_size", 32), ("intermediate_size", 32), ("head_dim", 32)):
        value = getattr(config, field)
        if value % unit:
            raise ValueError(f"{field}: {value}, must be a multiple of {unit}")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads: {config.num_heads}, must be a multiple of num_kv_heads {config.num_kv_heads}"
        )


def rotation_table(config: ModelConfig, num_positions: int) -> F32:
    """[positions, 2, head_dim]: cosines, each twice, and sines as (-s, s)."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = frequencies / np.asarray(config.rope_scaling)
    angles = np.arange(num_positions)[:, None] * frequencies
    table = np.empty((num_positions, 2, config.head_dim), np.float32)
    table[:, 0] = np.repeat(np.cos(angles), 2, axis=1)
    table[:, 1, 0::2] = -np.sin(angles)
    table[:, 1, 1::2] = np.sin(angles)
    return table


def _matrix_names(config: ModelConfig) -> list[tuple[str, ...]]:
    """Which tensors make up which matrix: embedding, head, then per layer Q,K,V, output, gate and up, down."""
    names: list[tuple[str, ...]] = (
        [("token_embd",)] if config.tied_embeddings else [("token_embd",), ("output",)]
    )
    for layer in range(config.num_layers):
        blocks = ("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",)
        names += [tuple(f"blk.{layer}.{part}" for part in block) for block in blocks]
    return names


def _record(matrix: PackedMatrix) -> tuple[int, int, int, int, int]:
    return matrix.form, matrix.data.ctypes.data, matrix.panel_bytes, matrix.num_blocks, matrix.num_panels


def _serve(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in one kind the kernels have: as they are where they agree, else in 8-bit blocks.

    Embedding and head get 8-bit blocks where they come as floats: per channel they alone would cost 2 % of the top
    tokens.
    """
    kinds = {tensor.kind for tensor in tensors}
    ends = any(tensor.name in ("token_embd", "output") for tensor in tensors)
    if len(kinds) == 1 and not (ends and kinds <= {"f32", "f16", "bf16"}):
        return tensors
    return [
        tensor
        if tensor.kind == "q8_0"
        else Tensor(tensor.name, "q8_0", tensor.shape, quantise_q8_0(dequantise(tensor)))
        for tensor in tensors
    ]
