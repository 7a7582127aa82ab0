"""Which way the integer products of attention go: tiles where there are tiles and rows enough, pairs of 16-bit
integers where a machine has no dot product of four bytes, else those.

A row of a product is a query, or the weights of a stretch: its lead, the high limbs or, for pairs, the whole integers,
and its low limbs.
"""

from typing import Any

from engine.kernels import attention_dots, attention_shorts, attention_tiles, simd
from engine.kernels.isa import Isa
from engine.kernels.jit import overload
from engine.kernels.quantised import BY_OCTETS, store_shorts


def spare_bytes(head_dim: int) -> int:
    """Working memory of the products for one thread."""
    return max(attention_shorts.spare_bytes(head_dim), attention_tiles.spare_bytes(head_dim))


def lead_bytes(isa: Isa) -> int:
    """Bytes of an integer of a row's lead."""
    raise NotImplementedError


def store_lead(isa: Isa, lead: int, index: int, integers: Any, high: Any) -> None:
    """16 integers, whose high limbs are `high`, from `index` on into a row's lead."""
    raise NotImplementedError


def ready(
    isa: Isa, num_rows: int, head_dim: int, first: int, second: int, first_values: int, second_values: int,
    num_tokens: int, spare: int, ahead: int, ahead_second: int,
) -> bool:  # fmt: skip
    """Prepare a stretch's keys and values for `num_rows` rows; true: the products go by tiles."""
    raise NotImplementedError


def score(
    isa: Isa, tiled: bool, begin: int, end: int, lead: int, low: int, head_dim: int, first: int, second: int,
    num_tokens: int, scores: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """scores[row][64] = Σ of queries' integers times those of a stretch's keys (high bytes raised by KEY_OFFSET).

    Rows begin..end lie in one group of 16. What lies `ahead` of the two blocks is fetched.
    """
    raise NotImplementedError


def mix(
    isa: Isa, tiled: bool, begin: int, end: int, lead: int, low: int, head_dim: int, first: int, second: int,
    num_tokens: int, shrinks: int, units: int, mixed: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """mixed[row] = mixed[row] · shrink + unit · Σ of weights' integers times those of a stretch's values."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(lead_bytes)
def _lead_bytes(isa: Any) -> Any:
    def one(isa: Any) -> int:
        return 1

    def two(isa: Any) -> int:
        return 2

    return two if isa.tag in BY_OCTETS else one


@overload(store_lead)
def _store_lead(isa: Any, lead: Any, index: Any, integers: Any, high: Any) -> Any:
    def limbs(isa: Any, lead: Any, index: Any, integers: Any, high: Any) -> None:
        simd.store_i8(lead + index, high)

    def shorts(isa: Any, lead: Any, index: Any, integers: Any, high: Any) -> None:
        store_shorts(lead + 2 * index, integers)

    return shorts if isa.tag in BY_OCTETS else limbs


@overload(ready)
def _ready(
    isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
    num_tokens: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
        num_tokens: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> bool:  # fmt: skip
        return False

    def by_shorts(
        isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
        num_tokens: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> bool:  # fmt: skip
        attention_shorts.gather(head_dim, first, second, first_values, second_values, num_tokens, spare)
        return False

    def by_tiles(
        isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, first_values: Any, second_values: Any,
        num_tokens: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> bool:  # fmt: skip
        if num_rows < attention_tiles.MIN_ROWS or head_dim % 64:
            return False
        attention_tiles.gather(first_values, second_values, head_dim, spare)
        return True

    if isa.tag in BY_OCTETS:
        return by_shorts
    return by_tiles if isa.tag == "amx" else by_dots


@overload(score)
def _score(
    isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
    num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_dots.score(
            isa, begin, end, lead, low, head_dim, first, second, num_tokens, scores, ahead, ahead_second
        )

    def by_either(
        isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        if tiled:
            attention_tiles.score(begin, end, lead, low, head_dim, first, second, num_tokens, scores, spare)
        else:
            attention_dots.score(
                isa, begin, end, lead, low, head_dim, first, second, num_tokens, scores, ahead, ahead_second
            )

    def by_shorts(
        isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_shorts.score(
            isa,
            begin,
            end,
            lead,
            low,
            head_dim,
            first,
            second,
            num_tokens,
            scores,
            spare,
            ahead,
            ahead_second,
        )

    if isa.tag in BY_OCTETS:
        return by_shorts
    return by_either if isa.tag == "amx" else by_dots


@overload(mix)
def _mix(
    isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
    num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_dots.mix(
            isa, begin, end, lead, low, head_dim, first, second, num_tokens, shrinks, units, mixed, ahead,
            ahead_second,
        )  # fmt: skip

    def by_either(
        isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        if tiled:
            attention_tiles.mix(begin, end, lead, low, head_dim, shrinks, units, mixed, spare)
        else:
            attention_dots.mix(
                isa, begin, end, lead, low, head_dim, first, second, num_tokens, shrinks, units, mixed, ahead,
                ahead_second,
            )  # fmt: skip

    def by_shorts(
        isa: Any, tiled: Any, begin: Any, end: Any, lead: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_shorts.mix(
            isa, begin, end, lead, low, head_dim, first, second, num_tokens, shrinks, units, mixed, spare, ahead,
            ahead_second,
        )  # fmt: skip

    if isa.tag in BY_OCTETS:
        return by_shorts
    return by_either if isa.tag == "amx" else by_dots
