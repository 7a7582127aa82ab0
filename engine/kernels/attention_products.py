"""Which way the integer products of attention go: tiles where there are tiles and rows enough, else dot products of
four bytes.

A row of a product is a query, or the weights of a stretch: bytes, small enough that products of neighbours, of bytes 2n
and 2n + 1, add up to 16 bits.
"""

from typing import Any

from engine.kernels import attention_dots, attention_tiles
from engine.kernels.isa import Isa
from engine.kernels.jit import overload


def spare_bytes(head_dim: int) -> int:
    """Working memory of the products for one thread."""
    return attention_tiles.spare_bytes(head_dim)


def prepare(
    isa: Isa, num_rows: int, head_dim: int, first_values: int, second_values: int, spare: int
) -> bool:
    """Make a stretch's values ready in `spare` when tiles pay for `num_rows` rows; whether they do."""
    raise NotImplementedError


def score(
    isa: Isa, prepared: bool, begin: int, end: int, rows: int, head_dim: int, first: int, second: int,
    num_tokens: int, scores: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """scores[row][64] = Σ of queries' integers times those of a stretch's keys (raised by KEY_OFFSET).

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
@overload(prepare)
def _prepare(
    isa: Any, num_rows: Any, head_dim: Any, first_values: Any, second_values: Any, spare: Any
) -> Any:
    def for_dots(
        isa: Any, num_rows: Any, head_dim: Any, first_values: Any, second_values: Any, spare: Any
    ) -> bool:
        return False

    def for_tiles(
        isa: Any, num_rows: Any, head_dim: Any, first_values: Any, second_values: Any, spare: Any
    ) -> bool:
        if num_rows < attention_tiles.MIN_ROWS or head_dim % 64:
            return False
        attention_tiles.gather(first_values, second_values, head_dim, spare)
        return True

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

    return by_either if isa.tag == "amx" else by_dots
