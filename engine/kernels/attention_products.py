"""Which way the integer products of attention go: tiles where there are tiles and rows enough, pairs of 16-bit
integers where a machine has no dot product of four bytes, else those.

A row of a product is a query, or the weights of a stretch: 8-bit integers, as bytes or, for pairs, in 16 bits.
"""

from typing import Any

from engine.kernels import attention_dots, attention_shorts, attention_tiles, simd
from engine.kernels.isa import Isa
from engine.kernels.jit import overload
from engine.kernels.quantised import BY_OCTETS, store_shorts


def spare_bytes(head_dim: int) -> int:
    """Working memory of the products for one thread."""
    return max(attention_shorts.spare_bytes(head_dim), attention_tiles.spare_bytes(head_dim))


def integer_bytes(isa: Isa) -> int:
    """Bytes of an integer of a row."""
    raise NotImplementedError


def store_integers(isa: Isa, row: int, index: int, integers: Any) -> None:
    """16 integers from `index` on into a row."""
    raise NotImplementedError


def prepare(
    isa: Isa, num_rows: int, head_dim: int, first: int, second: int, first_values: int, second_values: int,
    num_tokens: int, spare: int,
) -> bool:  # fmt: skip
    """Make a stretch's keys and values ready in `spare` when that pays for `num_rows` rows; whether it did."""
    raise NotImplementedError


def score(
    isa: Isa, prepared: bool, begin: int, end: int, rows: int, head_dim: int, first: int, second: int,
    num_tokens: int, scores: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """scores[row][64] = Σ of queries' integers times those of a stretch's keys (raised by LIMB · KEY_OFFSET).

    Rows begin..end lie in one group of 16. What lies `ahead` of the two blocks is fetched, unless they were prepared.
    """
    raise NotImplementedError


def mix(
    isa: Isa, prepared: bool, begin: int, end: int, rows: int, head_dim: int, first: int, second: int,
    num_tokens: int, shrinks: int, units: int, mixed: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """mixed[row] = mixed[row] · shrink + unit · Σ of weights' integers times those of a stretch's values."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(integer_bytes)
def _integer_bytes(isa: Any) -> Any:
    def one(isa: Any) -> int:
        return 1

    def two(isa: Any) -> int:
        return 2

    return two if isa.tag in BY_OCTETS else one


@overload(store_integers)
def _store_integers(isa: Any, row: Any, index: Any, integers: Any) -> Any:
    def octets(isa: Any, row: Any, index: Any, integers: Any) -> None:
        simd.store_i8(row + index, integers)

    def shorts(isa: Any, row: Any, index: Any, integers: Any) -> None:
        store_shorts(row + 2 * index, integers)

    return shorts if isa.tag in BY_OCTETS else octets


@overload(prepare)
def _prepare(
    isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
    num_tokens: Any, spare: Any,
) -> Any:  # fmt: skip
    def for_dots(
        isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
        num_tokens: Any, spare: Any,
    ) -> bool:  # fmt: skip
        return False

    def for_shorts(
        isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
        num_tokens: Any, spare: Any,
    ) -> bool:  # fmt: skip
        if num_rows < attention_shorts.MIN_ROWS:
            return False
        attention_shorts.gather(head_dim, first, second, first_values, second_values, num_tokens, spare)
        return True

    def for_tiles(
        isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
        num_tokens: Any, spare: Any,
    ) -> bool:  # fmt: skip
        if num_rows < attention_tiles.MIN_ROWS or head_dim % 64:
            return False
        attention_tiles.gather(first_values, second_values, head_dim, spare)
        return True

    if isa.tag in BY_OCTETS:
        return for_shorts
    return for_tiles if isa.tag == "amx" else for_dots


@overload(score)
def _score(
    isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
    num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_dots.score(
            isa, begin, end, rows, head_dim, first, second, num_tokens, scores, ahead, ahead_second
        )

    def by_either(
        isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        if prepared:
            attention_tiles.score(begin, end, rows, head_dim, first, second, num_tokens, scores, spare)
        else:
            attention_dots.score(
                isa, begin, end, rows, head_dim, first, second, num_tokens, scores, ahead, ahead_second
            )

    def by_shorts(
        isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_shorts.score(
            isa, prepared, begin, end, rows, head_dim, first, second, num_tokens, scores, spare, ahead,
            ahead_second,
        )  # fmt: skip

    if isa.tag in BY_OCTETS:
        return by_shorts
    return by_either if isa.tag == "amx" else by_dots


@overload(mix)
def _mix(
    isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
    num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_dots.mix(
            isa,
            begin,
            end,
            rows,
            head_dim,
            first,
            second,
            num_tokens,
            shrinks,
            units,
            mixed,
            ahead,
            ahead_second,
        )

    def by_either(
        isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        if prepared:
            attention_tiles.mix(begin, end, rows, head_dim, shrinks, units, mixed, spare)
        else:
            attention_dots.mix(
                isa, begin, end, rows, head_dim, first, second, num_tokens, shrinks, units, mixed, ahead,
                ahead_second,
            )  # fmt: skip

    def by_shorts(
        isa: Any, prepared: Any, begin: Any, end: Any, rows: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_shorts.mix(
            isa, prepared, begin, end, rows, head_dim, first, second, num_tokens, shrinks, units, mixed, spare,
            ahead, ahead_second,
        )  # fmt: skip

    if isa.tag in BY_OCTETS:
        return by_shorts
    return by_either if isa.tag == "amx" else by_dots
