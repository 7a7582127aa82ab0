"""Which way the integer products of attention go: tiles where there are tiles and rows enough, else dot products."""

from typing import Any

from engine.kernels import attention_dots, attention_tiles
from engine.kernels.isa import Isa
from engine.kernels.jit import overload


def ready(isa: Isa, num_rows: int, head_dim: int, first: int, second: int, spare: int) -> bool:
    """Prepare a stretch's values at `first` and `second` for `num_rows` rows; true: the products go by tiles."""
    raise NotImplementedError


def score(
    isa: Isa, tiled: bool, begin: int, end: int, high: int, low: int, head_dim: int, first: int, second: int,
    num_tokens: int, scores: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """scores[row][64] = Σ of queries' integers times those of a stretch's keys (high bytes raised by KEY_OFFSET).

    Rows begin..end lie in one group of 16. What lies `ahead` of the two blocks is fetched.
    """
    raise NotImplementedError


def mix(
    isa: Isa, tiled: bool, begin: int, end: int, high: int, low: int, head_dim: int, first: int, second: int,
    num_tokens: int, shrinks: int, units: int, mixed: int, spare: int, ahead: int, ahead_second: int,
) -> None:  # fmt: skip
    """mixed[row] = mixed[row] · shrink + unit · Σ of weights' integers times those of a stretch's values."""
    raise NotImplementedError


# Numba wants the implementation's parameters annotated as the overload's are.
@overload(ready)
def _ready(isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, spare: Any) -> Any:
    def by_dots(isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, spare: Any) -> bool:
        return False

    def by_tiles(isa: Any, num_rows: Any, head_dim: Any, first: Any, second: Any, spare: Any) -> bool:
        if num_rows < attention_tiles.MIN_ROWS or head_dim % 64:
            return False
        attention_tiles.gather(first, second, head_dim, spare)
        return True

    return by_tiles if isa.tag == "amx" else by_dots


@overload(score)
def _score(
    isa: Any, tiled: Any, begin: Any, end: Any, high: Any, low: Any, head_dim: Any, first: Any, second: Any,
    num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, tiled: Any, begin: Any, end: Any, high: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_dots.score(
            isa, begin, end, high, low, head_dim, first, second, num_tokens, scores, ahead, ahead_second
        )

    def by_either(
        isa: Any, tiled: Any, begin: Any, end: Any, high: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, scores: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        if tiled:
            attention_tiles.score(begin, end, high, low, head_dim, first, second, num_tokens, scores, spare)
        else:
            attention_dots.score(
                isa, begin, end, high, low, head_dim, first, second, num_tokens, scores, ahead, ahead_second
            )

    return by_either if isa.tag == "amx" else by_dots


@overload(mix)
def _mix(
    isa: Any, tiled: Any, begin: Any, end: Any, high: Any, low: Any, head_dim: Any, first: Any, second: Any,
    num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
) -> Any:  # fmt: skip
    def by_dots(
        isa: Any, tiled: Any, begin: Any, end: Any, high: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        attention_dots.mix(
            isa, begin, end, high, low, head_dim, first, second, num_tokens, shrinks, units, mixed, ahead,
            ahead_second,
        )  # fmt: skip

    def by_either(
        isa: Any, tiled: Any, begin: Any, end: Any, high: Any, low: Any, head_dim: Any, first: Any, second: Any,
        num_tokens: Any, shrinks: Any, units: Any, mixed: Any, spare: Any, ahead: Any, ahead_second: Any,
    ) -> None:  # fmt: skip
        if tiled:
            attention_tiles.mix(begin, end, high, low, head_dim, shrinks, units, mixed, spare)
        else:
            attention_dots.mix(
                isa, begin, end, high, low, head_dim, first, second, num_tokens, shrinks, units, mixed, ahead,
                ahead_second,
            )  # fmt: skip

    return by_either if isa.tag == "amx" else by_dots
