"""Matrix products the quickest way a path has: AMX tiles, dot products of four bytes, pairs of bytes or of shorts."""

from typing import Any

from engine.kernels import amx, octets, shorts, tiles_blocks, tiles_whole
from engine.kernels.isa import Isa
from engine.kernels.jit import inline, jit, overload
from engine.kernels.matmul import multiply_panel
from engine.kernels.packing import FACTORED, Q8_0
from engine.kernels.quantised import BY_OCTETS, BY_SHORTS, MANY_ROWS, SHORTS, TILE_ROWS, layout_of

MIN_ROWS = (8, 13, 8)
"""By form: fewer rows than this are quicker without tiles, for expanding a panel costs as much as some rows without."""
MIN_REST = 3
"""Once a panel is expanded, tiles are quicker for so many rows left over."""


def scratch_bytes(num_inputs: int) -> int:
    """Working memory of `multiply` for one thread."""
    by_tiles = max(tiles_whole.scratch_bytes(num_inputs), tiles_blocks.scratch_bytes(num_inputs))
    return max(by_tiles, shorts.scratch_bytes(num_inputs), octets.scratch_bytes(num_inputs))


@inline
def config_of(form: int) -> int:
    """Which configuration of the tiles products with weights of `form` want."""
    return amx.HALF if form == Q8_0 else amx.FULL


@jit
def multiply_panel_by_tiles(
    form: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` on tiles, which must be configured; the rows' buffers are padded to 16 rows."""
    if form == Q8_0:
        tiles_blocks.multiply(first, last, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch)
        return
    for begin in range(first, last, tiles_whole.MAX_TILES * TILE_ROWS):
        stop = min(last, begin + tiles_whole.MAX_TILES * TILE_ROWS)
        if form == FACTORED:
            tiles_whole.multiply(0, begin, stop, panel, num_blocks, x, scales, out, out_stride, add, scratch)
        else:
            tiles_whole.multiply(2, begin, stop, panel, num_blocks, x, scales, out, out_stride, add, scratch)


@jit
def multiply_panel_by_shorts(
    isa: Isa, form: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` by pairs of 16 bits; the rows' buffers are padded to 16 rows."""
    if form == Q8_0:
        shorts.multiply_few(isa, 1, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)
    elif last - first < MANY_ROWS:
        if form == FACTORED:
            shorts.multiply_few(isa, 0, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)
        else:
            shorts.multiply_few(isa, 2, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)
    else:
        for begin in range(first, last, shorts.MAX_ROWS):
            stop = min(last, begin + shorts.MAX_ROWS)
            if form == FACTORED:
                shorts.multiply_whole(
                    isa, 0, begin, stop, panel, num_blocks, x, scales, out, out_stride, add, scratch
                )
            else:
                shorts.multiply_whole(
                    isa, 2, begin, stop, panel, num_blocks, x, scales, out, out_stride, add, scratch
                )


@jit
def multiply_panel_by_octets(
    num_rows: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int, scales: int, out: int,
    out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` of 4-bit weights by pairs of bytes; the rows' buffers are padded to 16 rows.

    `num_rows`: of all rows that were quantised together.
    """
    for begin in range(first, last, shorts.MAX_ROWS):
        stop = min(last, begin + shorts.MAX_ROWS)
        octets.multiply(
            num_rows, begin, stop, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
        )


def multiply(
    isa: Isa, num_rows: int, form: int, first: int, last: int, panel: int, num_blocks: int, x: int, sums: int,
    scales: int, out: int, out_stride: int, add: int, scratch: int,
) -> None:  # fmt: skip
    """`matmul.multiply_panel` the quickest way the path has, with the tiles configured as `config_of(form)`.

    `num_rows`: of all rows that were quantised together, of which these are some.
    """
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(multiply)
def _multiply(
    isa: Any,
    num_rows: Any,
    form: Any,
    first: Any,
    last: Any,
    panel: Any,
    num_blocks: Any,
    x: Any,
    sums: Any,
    scales: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    scratch: Any,
) -> Any:
    def plainly(
        isa: Any,
        num_rows: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        multiply_panel(isa, form, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    def by_tiles(
        isa: Any,
        num_rows: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        middle = first
        if last - first >= MIN_ROWS[form]:
            rest = (last - first) % TILE_ROWS
            middle = last if rest >= MIN_REST else last - rest
        if middle > first:
            multiply_panel_by_tiles(
                form, first, middle, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
            )
        if last > middle:
            multiply_panel(isa, form, middle, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    def by_shorts_or_dots(
        isa: Any,
        num_rows: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        if layout_of(isa, form, num_rows) == SHORTS:
            multiply_panel_by_shorts(
                isa, form, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
            )
        else:
            multiply_panel(isa, form, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add)

    def by_octets_or_shorts(
        isa: Any,
        num_rows: Any,
        form: Any,
        first: Any,
        last: Any,
        panel: Any,
        num_blocks: Any,
        x: Any,
        sums: Any,
        scales: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        scratch: Any,
    ) -> None:
        if layout_of(isa, form, num_rows) == SHORTS:
            multiply_panel_by_shorts(
                isa, form, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
            )
        else:
            multiply_panel_by_octets(
                num_rows, first, last, panel, num_blocks, x, sums, scales, out, out_stride, add, scratch
            )

    if isa.tag in BY_OCTETS:
        return by_octets_or_shorts
    if isa.tag in BY_SHORTS:
        return by_shorts_or_dots
    return by_tiles if isa.tag == "amx" else plainly
