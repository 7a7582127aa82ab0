"""One step of the transformer over a batch of rows: what each phase is and how it is cut into chunks.

Per layer: norm and quantise → Q,K,V → rotate, transform and write KV → attention → quantise → output projection (added
to the row) → norm and quantise → gate and up with SiLU → quantise → down projection (added). Then the rows
that want logits: norm and quantise → LM head. Nobody reads what the last layer makes of other rows than those, except
their KV: from attention on it goes over those alone, gathered. A phase of one chunk is done at once by the thread that
opens it.
"""

from typing import Any

import numpy as np

from engine.kernels import amx, hadamard, products, rows, simd
from engine.kernels.attention import attend
from engine.kernels.isa import Isa
from engine.kernels.jit import inline, jit
from engine.kernels.kv import BLOCK_TOKENS, head_bytes, write_key, write_value
from engine.kernels.quantised import TILE_ROWS
from engine.kernels.team import (
    DONE,
    FIRST,
    PHASES,
    TICKET,
    atomic_add,
    atomic_load,
    atomic_store,
    chunk_of,
    compare_and_swap,
    next_ticket,
    open_phase,
    phases_since,
    serial_of,
    taken,
    wait_for_next_phase,
    wake_helpers,
)
from engine.weights.quantise import GATED_MEANS, MIXED_MEANS, NORMED_MEANS

# Words of a plan: the model's shape, where its buffers lie, then the batch of this step.
(NUM_LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EMBEDDING, OUTPUT_NORM, HEAD, LAYERS, ANGLES,
 THREADS, FUTEX, HIDDEN_ROWS, QKV, MIXED, GATED, QUANTISED, SUMS, SCALES, LOGITS, LOGITS_STRIDE, SCRATCH,
 SCRATCH_STRIDE, CACHE, BLOCK_BYTES, NUM_ROWS, TOKENS, POSITIONS, ROW_BLOCKS, NUM_LOGIT_ROWS, LOGIT_ROWS, NUM_TILES,
 TILES, CONTROL, TILE_CONFIGS, LAST_ROWS) = range(37)  # fmt: skip
PLAN_WORDS = 37

# Words of a matrix record, and where a layer's matrices and norms lie in its record.
FORM, DATA, PANEL_BYTES, NUM_BLOCKS, NUM_PANELS = range(5)
MATRIX_WORDS = 5
LAYER_QKV, LAYER_OUTPUT, LAYER_GATE_UP, LAYER_DOWN = (MATRIX_WORDS * index for index in range(4))
ATTENTION_NORM, FEED_FORWARD_NORM = 4 * MATRIX_WORDS, 4 * MATRIX_WORDS + 1
LAYER_WORDS = 4 * MATRIX_WORDS + 2

# Words of an attention tile: rows of one sequence.
TILE_ROW, TILE_COUNT, TILE_POSITION, TILE_TABLE = range(4)
TILE_WORDS = 4

OF_NORMED, OF_MIXED, OF_GATED = np.float32(NORMED_MEANS), np.float32(MIXED_MEANS), np.float32(GATED_MEANS)
FEW_ROWS, MANY_ROWS = 4, 32
"""Rows of one chunk of a phase that goes row by row: the many where all threads get some, so that the rows of a KV
block, whose keys share cache lines, are one thread's."""
MATRIX_ROWS = 256
"""Rows of one chunk of a matrix product: bounds the gate/up scratch and the time of a chunk."""
SHARED_ROWS = 192
"""From so many rows on each thread expands weights for rows of its own."""
GATE_UP_BYTES = 2 * MATRIX_ROWS * 64
CHUNKS_PER_THREAD = 6
NUM_PHASES = 10
(NORM_QKV, MATRIX_QKV, ROTATE, ATTEND, QUANTISE_MIXED, MATRIX_OUTPUT, NORM_GATE_UP, MATRIX_GATE_UP, QUANTISE_GATED,
 MATRIX_DOWN) = range(NUM_PHASES)  # fmt: skip


@inline
def _word(plan: int, index: int) -> Any:
    return simd.read_i64(plan + index * 8)


@inline
def _rows_per_chunk(plan: int, num_rows: int) -> Any:
    return MANY_ROWS if num_rows >= MANY_ROWS * _word(plan, THREADS) else FEW_ROWS


@inline
def _row_chunks(plan: int, num_rows: int) -> Any:
    per_chunk = _rows_per_chunk(plan, num_rows)
    return (num_rows + per_chunk - 1) // per_chunk


@inline
def _panels_per_chunk(plan: int, num_panels: int, unit: int) -> Any:
    wanted = _word(plan, THREADS) * CHUNKS_PER_THREAD
    return max(1, num_panels // unit // wanted) * unit


@inline
def _rows_of_matrix_chunk(plan: int, num_rows: int) -> Any:
    # Many rows: a share for each thread at least, so that rows stay with their core.
    threads = _word(plan, THREADS) if num_rows >= SHARED_ROWS else 1
    shares = max(threads, (num_rows + MATRIX_ROWS - 1) // MATRIX_ROWS)
    tiles_each = (num_rows + shares * TILE_ROWS - 1) // (shares * TILE_ROWS)
    return min(MATRIX_ROWS, max(1, tiles_each) * TILE_ROWS)


@inline
def _matrix_chunks(plan: int, num_rows: int, num_panels: int, unit: int) -> Any:
    per_chunk, rows_each = _panels_per_chunk(plan, num_panels, unit), _rows_of_matrix_chunk(plan, num_rows)
    return (num_rows + rows_each - 1) // rows_each * ((num_panels + per_chunk - 1) // per_chunk)


@inline
def _matrix_of(phase: int) -> Any:
    if phase == MATRIX_QKV:
        return LAYER_QKV
    if phase == MATRIX_OUTPUT:
        return LAYER_OUTPUT
    if phase == MATRIX_GATE_UP:
        return LAYER_GATE_UP
    return LAYER_DOWN


@inline
def _is_matrix(phase: int) -> Any:
    return phase in (MATRIX_QKV, MATRIX_OUTPUT, MATRIX_GATE_UP, MATRIX_DOWN)


@inline
def _wants_logits(plan: int, layer: int, phase: int) -> Any:
    """Whether a phase goes over the rows that want logits alone, which lie in LAST_ROWS: the end of the last layer."""
    last = _word(plan, NUM_LAYERS) - 1
    return layer > last or (layer == last and phase >= QUANTISE_MIXED)


@inline
def _num_rows(plan: int, layer: int, phase: int) -> Any:
    return _word(plan, NUM_LOGIT_ROWS) if _wants_logits(plan, layer, phase) else _word(plan, NUM_ROWS)


@jit
def num_chunks(plan: int, index: int) -> Any:
    """Chunks of the phase `index` of the step; 0: nothing to do in it."""
    layer, phase = index // NUM_PHASES, index % NUM_PHASES
    num_rows = _num_rows(plan, layer, phase)
    if layer == _word(plan, NUM_LAYERS):
        if phase == 0:
            return _row_chunks(plan, num_rows)
        return _matrix_chunks(plan, num_rows, _word(_word(plan, HEAD), NUM_PANELS), 1)
    if phase == ATTEND:
        return _word(plan, NUM_TILES) * _word(plan, KV_HEADS)
    if _is_matrix(phase):
        matrix = _word(plan, LAYERS) + (layer * LAYER_WORDS + _matrix_of(phase)) * 8
        return _matrix_chunks(plan, num_rows, _word(matrix, NUM_PANELS), 2 if phase == MATRIX_GATE_UP else 1)
    return _row_chunks(plan, num_rows)


@inline
def _quantise(
    isa: Isa,
    plan: int,
    matrix: int,
    num_rows: int,
    row: int,
    source: int,
    length: int,
    means: float,
    ahead: int,
) -> None:
    form, quantised, sums, scales = (
        _word(matrix, FORM),
        _word(plan, QUANTISED),
        _word(plan, SUMS),
        _word(plan, SCALES),
    )
    rows.quantise_row(isa, form, num_rows, row, source, length, quantised, sums, scales, means, ahead)


@inline
def _next_row(source: int, length: int, row: int, num_rows: int) -> Any:
    """Where the row after `row`, of so many floats, lies; the row itself if it is the last."""
    return source + length * 4 if row + 1 < num_rows else source


@inline
def _norm_and_quantise(
    isa: Isa, plan: int, matrix: int, num_rows: int, row: int, source: int, weight: int, scratch: int
) -> None:
    hidden = _word(plan, HIDDEN)
    rows.norm_row(source, weight, hidden, simd.read_f32(plan + PLAN_WORDS * 8), scratch)
    ahead = _next_row(source, hidden, row, num_rows)
    _quantise(isa, plan, matrix, num_rows, row, scratch, hidden, OF_NORMED, ahead)


@inline
def _rotate_row(plan: int, layer: int, row: int) -> None:
    heads, kv_heads, head_dim = _word(plan, HEADS), _word(plan, KV_HEADS), _word(plan, HEAD_DIM)
    query = _word(plan, QKV) + row * (heads + 2 * kv_heads) * head_dim * 4
    position = simd.read_i32(_word(plan, POSITIONS) + row * 4)
    angles = _word(plan, ANGLES) + position * head_dim * 8
    factor = simd.read_f32(plan + PLAN_WORDS * 8 + 4) / np.float32(hadamard.size(head_dim))
    rows.rotate_row(query, angles, heads, head_dim, factor, query)
    key = query + heads * head_dim * 4
    rows.rotate_row(key, angles, kv_heads, head_dim, rows.ONE, key)
    for head in range(heads + kv_heads):
        hadamard.transform(query + head * head_dim * 4, head_dim)
    value = key + kv_heads * head_dim * 4
    part_bytes = head_bytes(head_dim)
    slot = position % BLOCK_TOKENS
    target = (
        _word(plan, CACHE)
        + simd.read_i32(_word(plan, ROW_BLOCKS) + row * 4) * _word(plan, BLOCK_BYTES)
        + layer * 2 * kv_heads * part_bytes
    )
    for head in range(kv_heads):
        write_key(key + head * head_dim * 4, head_dim, slot, target + head * part_bytes)
        write_value(value + head * head_dim * 4, head_dim, slot, target + (kv_heads + head) * part_bytes)


@inline
def _any_wants_logits(plan: int, first: int, count: int) -> Any:
    for index in range(_word(plan, NUM_LOGIT_ROWS)):
        if first <= simd.read_i32(_word(plan, LOGIT_ROWS) + index * 4) < first + count:
            return True
    return False


@inline
def _attend(isa: Isa, plan: int, layer: int, chunk: int, scratch: int) -> None:
    heads, kv_heads, head_dim = _word(plan, HEADS), _word(plan, KV_HEADS), _word(plan, HEAD_DIM)
    tile = _word(plan, TILES) + chunk // kv_heads * TILE_WORDS * 8
    head, row = chunk % kv_heads, _word(tile, TILE_ROW)
    if layer == _word(plan, NUM_LAYERS) - 1 and not _any_wants_logits(plan, row, _word(tile, TILE_COUNT)):
        return
    group = heads // kv_heads
    stride = (heads + 2 * kv_heads) * head_dim * 4
    part_bytes = head_bytes(head_dim)
    first = head * group * head_dim * 4
    keys_at = layer * 2 * kv_heads * part_bytes + head * part_bytes
    attend(
        isa,
        _word(plan, TILE_CONFIGS),
        _word(plan, QKV) + row * stride + first,
        stride,
        _word(tile, TILE_COUNT),
        _word(tile, TILE_POSITION),
        group,
        head_dim,
        _word(tile, TILE_TABLE),
        _word(plan, CACHE),
        _word(plan, BLOCK_BYTES),
        keys_at,
        keys_at + kv_heads * part_bytes,
        _word(plan, MIXED) + row * heads * head_dim * 4 + first,
        heads * head_dim * 4,
        scratch,
    )


@jit
def multiply_chunk(
    isa: Isa,
    plan: int,
    matrix: int,
    num_rows: int,
    chunk: int,
    unit: int,
    out: int,
    out_stride: int,
    add: int,
    scratch: int,
) -> None:
    """One chunk of a product of all quantised rows with a matrix; `unit` 2: gate and up panels, joined by SiLU."""
    num_panels, num_blocks = _word(matrix, NUM_PANELS), _word(matrix, NUM_BLOCKS)
    per_chunk = _panels_per_chunk(plan, num_panels, unit)
    across = (num_panels + per_chunk - 1) // per_chunk
    rows_each = _rows_of_matrix_chunk(plan, num_rows)
    first = chunk // across * rows_each
    last = min(first + rows_each, num_rows)
    form, data, panel_bytes = _word(matrix, FORM), _word(matrix, DATA), _word(matrix, PANEL_BYTES)
    x, sums, scales = _word(plan, QUANTISED), _word(plan, SUMS), _word(plan, SCALES)
    begin = chunk % across * per_chunk
    spare = scratch + GATE_UP_BYTES
    amx.begin(isa, products.config_of(form), _word(plan, TILE_CONFIGS))
    for panel in range(begin, min(begin + per_chunk, num_panels)):
        weights = data + panel * panel_bytes
        side, stride = out + panel * 64, out_stride
        if unit == 2:
            side, stride = scratch + panel % 2 * MATRIX_ROWS * 64 - first * 64, 64
        products.multiply(
            isa, num_rows, form, first, last, weights, num_blocks, x, sums, scales, side, stride, add, spare
        )
        if unit == 2 and panel % 2 == 1:
            target = out + first * out_stride + panel // 2 * 64
            rows.gate_rows(scratch, scratch + MATRIX_ROWS * 64, last - first, target, out_stride)
    amx.end(isa)


@inline
def _gather_row(plan: int, row: int) -> Any:
    """Row `row` of those that want logits to LAST_ROWS; where its attention's results lie."""
    source = simd.read_i32(_word(plan, LOGIT_ROWS) + row * 4)
    row_bytes = _word(plan, HIDDEN) * 4
    own, target = _word(plan, HIDDEN_ROWS) + source * row_bytes, _word(plan, LAST_ROWS) + row * row_bytes
    for at in range(0, row_bytes, 64):
        simd.store_f32(target + at, simd.load_f32(own + at))
    return _word(plan, MIXED) + source * _word(plan, HEADS) * _word(plan, HEAD_DIM) * 4


@inline
def _run_matrix(isa: Isa, plan: int, layer: int, phase: int, chunk: int, scratch: int) -> None:
    matrix = _word(plan, LAYERS) + (layer * LAYER_WORDS + _matrix_of(phase)) * 8
    unit, add, out, stride = 1, 1, _hidden_rows(plan, layer, phase), _word(plan, HIDDEN) * 4
    if phase == MATRIX_QKV:
        add, out = 0, _word(plan, QKV)
        stride = (_word(plan, HEADS) + 2 * _word(plan, KV_HEADS)) * _word(plan, HEAD_DIM) * 4
    elif phase == MATRIX_GATE_UP:
        unit, add, out, stride = 2, 0, _word(plan, GATED), _word(plan, INTERMEDIATE) * 4
    multiply_chunk(isa, plan, matrix, _num_rows(plan, layer, phase), chunk, unit, out, stride, add, scratch)


@inline
def _hidden_rows(plan: int, layer: int, phase: int) -> Any:
    return _word(plan, LAST_ROWS) if _wants_logits(plan, layer, phase) else _word(plan, HIDDEN_ROWS)


@inline
def _run_row(isa: Isa, plan: int, layer: int, phase: int, num_rows: int, row: int, scratch: int) -> None:
    record = _word(plan, LAYERS) + layer * LAYER_WORDS * 8
    here = _hidden_rows(plan, layer, phase) + row * _word(plan, HIDDEN) * 4
    if phase == NORM_QKV:
        if layer == 0:
            rows.embed(_word(plan, EMBEDDING), simd.read_i32(_word(plan, TOKENS) + row * 4), here)
        matrix = record + LAYER_QKV * 8
        _norm_and_quantise(isa, plan, matrix, num_rows, row, here, _word(record, ATTENTION_NORM), scratch)
    elif phase == ROTATE:
        _rotate_row(plan, layer, row)
    elif phase == QUANTISE_MIXED:
        width = _word(plan, HEADS) * _word(plan, HEAD_DIM)
        source = _word(plan, MIXED) + row * width * 4
        if _wants_logits(plan, layer, phase):
            source = _gather_row(plan, row)
        ahead = _next_row(source, width, row, num_rows)
        _quantise(isa, plan, record + LAYER_OUTPUT * 8, num_rows, row, source, width, OF_MIXED, ahead)
    elif phase == NORM_GATE_UP:
        matrix = record + LAYER_GATE_UP * 8
        _norm_and_quantise(isa, plan, matrix, num_rows, row, here, _word(record, FEED_FORWARD_NORM), scratch)
    else:
        width = _word(plan, INTERMEDIATE)
        source = _word(plan, GATED) + row * width * 4
        ahead = _next_row(source, width, row, num_rows)
        _quantise(isa, plan, record + LAYER_DOWN * 8, num_rows, row, source, width, OF_GATED, ahead)


@jit
def run_chunk(isa: Isa, plan: int, index: int, chunk: int, scratch: int) -> None:
    """Do chunk `chunk` of phase `index`."""
    layer, phase = index // NUM_PHASES, index % NUM_PHASES
    num_rows = _num_rows(plan, layer, phase)
    per_chunk = _rows_per_chunk(plan, num_rows)
    chunk_rows = range(chunk * per_chunk, min((chunk + 1) * per_chunk, num_rows))
    if layer == _word(plan, NUM_LAYERS):
        head = _word(plan, HEAD)
        if phase == 0:
            for row in chunk_rows:
                source = _word(plan, LAST_ROWS) + row * _word(plan, HIDDEN) * 4
                _norm_and_quantise(isa, plan, head, num_rows, row, source, _word(plan, OUTPUT_NORM), scratch)
        else:
            out, stride = _word(plan, LOGITS), _word(plan, LOGITS_STRIDE)
            multiply_chunk(isa, plan, head, num_rows, chunk, 1, out, stride, 0, scratch)
    elif phase == ATTEND:
        _attend(isa, plan, layer, chunk, scratch)
    elif _is_matrix(phase):
        _run_matrix(isa, plan, layer, phase, chunk, scratch)
    else:
        for row in chunk_rows:
            _run_row(isa, plan, layer, phase, num_rows, row, scratch)


@inline
def _open(isa: Isa, plan: int, index: int, scratch: int) -> None:
    """Do the phases of one chunk from `index` on, and open the first larger one (or the end) to the team."""
    control = _word(plan, CONTROL)
    last = _word(control, PHASES)
    while index < last:
        count = num_chunks(plan, index)
        if count > 1:
            break
        if count == 1:
            run_chunk(isa, plan, index, 0, scratch)
        index += 1
    open_phase(control, _word(control, FIRST) + index, _word(plan, FUTEX))


@jit
def take_part(isa: Isa, plan: int, worker: int) -> None:
    """Work on the current step until it ends."""
    control = _word(plan, CONTROL)
    scratch = _word(plan, SCRATCH) + worker * _word(plan, SCRATCH_STRIDE)
    while True:
        ticket = atomic_load(control + TICKET * 8)
        index = phases_since(serial_of(ticket), atomic_load(control + FIRST * 8))
        if index < 0 or index >= atomic_load(control + PHASES * 8):
            return
        count = num_chunks(plan, index)
        if taken(ticket) >= count:
            wait_for_next_phase(control, ticket, _word(plan, FUTEX))
        elif compare_and_swap(control + TICKET * 8, ticket, next_ticket(ticket, worker)):
            run_chunk(isa, plan, index, chunk_of(ticket, count, worker), scratch)
            if atomic_add(control + DONE * 8, 1) + 1 == count:
                atomic_store(control + DONE * 8, 0)
                _open(isa, plan, index + 1, scratch)


@jit
def run_step(isa: Isa, plan: int) -> None:
    """The whole step, from the engine's thread; helpers join in on their own."""
    control = _word(plan, CONTROL)
    first = serial_of(atomic_load(control + TICKET * 8)) + 1
    atomic_store(control + FIRST * 8, first)
    atomic_store(control + PHASES * 8, _word(plan, NUM_LAYERS) * NUM_PHASES + 2)
    scratch = _word(plan, SCRATCH)
    _open(isa, plan, 0, scratch)
    if _word(plan, THREADS) > 1:
        wake_helpers(control, _word(plan, FUTEX))
    take_part(isa, plan, 0)
