"""What has to be compiled before the first step, in one place."""

from typing import Any

from engine.kernels import attention, matmul, products, rows, sampling, step, team
from engine.kernels.isa import Isa, IsaType, choose
from engine.kernels.jit import Progress, compile_all, types
from engine.kernels.quantised import BY_OCTETS, BY_SHORTS


def warm(progress: Progress | None = None, isa: Isa | None = None) -> None:
    """Compile all kernels of one path, or load them from the cache (about a second)."""
    tag = IsaType((isa or choose()).name)
    i64, f32 = types.int64, types.float32
    limbs = (matmul.multiply_panel, (tag, *(i64,) * 11))
    shorts = (products.multiply_panel_by_shorts, (tag, *(i64,) * 12))
    octets = (products.multiply_panel_by_octets, (i64,) * 12)
    by_panel = (
        [octets, shorts] if tag.tag in BY_OCTETS else [limbs, shorts] if tag.tag in BY_SHORTS else [limbs]
    )
    wanted: list[tuple[Any, tuple[Any, ...]]] = [
        (rows.quantise_row, (tag, *(i64,) * 8, f32, i64)),
        (rows.norm_row, (i64, i64, i64, f32, i64)),
        (rows.gate_rows, (i64,) * 5),
        (rows.rotate_row, (i64, i64, i64, i64, f32, i64)),
        (rows.embed, (i64,) * 3),
        (attention.attend, (tag, *(i64,) * 15)),
        *by_panel,
        (team.sleep_until_woken, (i64,) * 2),
        (team.wake_helpers, (i64,) * 2),
        (step.num_chunks, (i64,) * 2),
        (step.multiply_chunk, (tag, *(i64,) * 9)),
        (step.run_chunk, (tag, *(i64,) * 4)),
        (step.take_part, (tag, i64, i64)),
        (step.run_step, (tag, i64)),
        *sampling.WANTED,
    ]
    compile_all(wanted, progress)
