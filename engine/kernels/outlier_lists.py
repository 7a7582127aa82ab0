"""Lists of the outliers among rows of octets: what is multiplied one by one, and where its weights lie.

Of every four inputs, 0 and 2 are a pair, and 1 and 3: weights lie as lines of pairs, see `shorts.expand`. Many rows
have a list each: where the line of an outlier begins, and a pair with x in its half, 0 in the other. Lists of four rows
that are multiplied together are made as long as the longest by entries that add nothing. Of few rows two
share a list, for their weights are made whole when they are multiplied: a pair of either, of which one number at least
is an outlier, and where its line begins, that of its four inputs as bytes, and what scales its block (see
`octet_panels.py`).
"""

from typing import Any

from engine.kernels import simd
from engine.kernels.jit import inline
from engine.kernels.quantised import (
    OCTET_STEP_BYTES,
    OUTLIER_BITS,
    OUTLIER_STEP_BYTES,
    PAIR_STEP_BYTES,
    SUM_BYTES,
    TILE_ROWS,
    TILE_SUMS_BYTES,
    outliers_place,
    sums_place,
)

LISTED_APART_FROM = 48
"""So many rows have a list each: from so many on it pays to make whole weights first, of all of a panel."""
ENTRY_BYTES = 8
ENTRIES_OF_LINE = 64 // ENTRY_BYTES
EVEN_ROWS = 4
"""Rows whose own lists are equally long."""
SHARING_ROWS = 2
SHARED_ENTRY_BYTES = 24
PAIR, LINE, QUAD, SHIFT, FACTORS = 0, 8, 12, 16, 20
"""Where in a shared entry lie the rows' pairs, and the places of: their line; their four inputs as bytes, and how far
those are shifted; their block's factors."""
LINE_BYTES = 64
BYTES_BYTES = 8 * LINE_BYTES
"""One block of a panel as bytes."""
FACTOR_BYTES = 3 * LINE_BYTES
"""What scales it."""
NUM_LISTED = OUTLIER_BITS
"""Where among the sums of the last block of a row, or of the first of two, the number of entries lies."""


@inline
def beyond_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's outliers in 16 bits among quantised rows."""
    return outliers_place(row, num_blocks) + row % TILE_ROWS * num_blocks * 64


@inline
def list_place(row: int, num_blocks: int) -> Any:
    """Byte offset of a row's own list among quantised rows; it goes on a step of octets further every 64 bytes."""
    return outliers_place(row, num_blocks) + row % TILE_ROWS * 64


@inline
def shared_list_place(row: int, num_blocks: int) -> Any:
    """Byte offset of the list that a row shares among quantised rows."""
    steps = (num_blocks + 1) // 2
    place = row % TILE_ROWS // SHARING_ROWS * (PAIR_STEP_BYTES * SHARING_ROWS // TILE_ROWS)
    return outliers_place(row, num_blocks) + steps * (OUTLIER_STEP_BYTES + place)


@inline
def listed_place(row: int, num_blocks: int) -> Any:
    """Byte offset of the number of entries among sums."""
    return sums_place(row, num_blocks) + (num_blocks - 1) * TILE_SUMS_BYTES + NUM_LISTED


@inline
def _outliers_of_step(sums: int, block: int, num_blocks: int) -> Any:
    """Which inputs of two blocks are outliers of a row, as bits: both at once, for a loop that ends is dear."""
    here = sums + block * TILE_SUMS_BYTES + OUTLIER_BITS
    bits = simd.read_i32(here) & 0xFFFFFFFF
    if block + 1 < num_blocks:
        bits |= simd.read_i32(here + TILE_SUMS_BYTES) << 32
    return bits


@inline
def _write_entry(own_list: int, index: int, line: int, pair: int) -> None:
    at = own_list + (index >> 3) * OCTET_STEP_BYTES + (index & 7) * ENTRY_BYTES
    simd.write_i32(at, line)
    simd.write_i32(at + 4, pair)


@inline
def list_of_row(row: int, source: int, factor: float, num_blocks: int, quantised: int, sums: int) -> None:
    """Once a row's blocks are written: its own list, of floats at `source` times `factor`."""
    own_list, own_sums = quantised + list_place(row, num_blocks), sums + sums_place(row, num_blocks)
    listed = 0
    for block in range(0, num_blocks, 2):
        outliers = _outliers_of_step(own_sums, block, num_blocks)
        while outliers:
            index = block * 32 + simd.lowest_bit(outliers)
            outliers &= outliers - 1
            value = simd.nearest_one(simd.read_f32(source + index * 4) * factor)
            line, half = index >> 2 << 1 | index & 1, index >> 1 & 1
            _write_entry(own_list, listed, line * LINE_BYTES, (value & 0xFFFF) << half * 16)
            listed += 1
    simd.write_i32(sums + listed_place(row, num_blocks), listed)


@inline
def even_lists(first: int, count: int, num_blocks: int, quantised: int, sums: int) -> None:
    """Once `count` rows from `first` on have lists: the shorter ones as long as the longest."""
    longest = 0
    for row in range(first, first + count):
        longest = max(longest, simd.read_i32(sums + listed_place(row, num_blocks)))
    for row in range(first, first + count):
        place = sums + listed_place(row, num_blocks)
        for index in range(simd.read_i32(place), longest):
            _write_entry(quantised + list_place(row, num_blocks), index, 0, 0)
        simd.write_i32(place, longest)


@inline
def list_of_two(first: int, count: int, num_blocks: int, quantised: int, sums: int) -> None:
    """Once `count` rows from `first` on are written, with what is beyond octets: the list they share."""
    shared, own_sums = quantised + shared_list_place(first, num_blocks), sums + sums_place(first, num_blocks)
    beyond, listed = quantised + beyond_place(first, num_blocks), 0
    for block in range(0, num_blocks, 2):
        bits = _outliers_of_step(own_sums, block, num_blocks)
        if count > 1:
            bits |= _outliers_of_step(own_sums + SUM_BYTES, block, num_blocks)
        # One bit a pair: that of input 0 or 1.
        bits = (bits | bits >> 2) & 0x3333333333333333
        while bits:
            index = simd.lowest_bit(bits)
            bits &= bits - 1
            line = block * 16 + (index >> 2 << 1 | index & 1)
            at, pair = shared + listed * SHARED_ENTRY_BYTES, beyond + line * 4
            simd.write_i32(at + PAIR, simd.read_i32(pair))
            if count > 1:
                simd.write_i32(at + PAIR + 4, simd.read_i32(pair + num_blocks * 64))
            simd.write_i32(at + LINE, line * LINE_BYTES)
            simd.write_i32(at + QUAD, (line >> 1) * LINE_BYTES)
            simd.write_i32(at + SHIFT, (line & 1) * 8)
            simd.write_i32(at + FACTORS, (line >> 4) * FACTOR_BYTES)
            listed += 1
    simd.write_i32(sums + listed_place(first, num_blocks), listed)
