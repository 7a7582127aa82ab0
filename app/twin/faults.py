"""What breaks during a simulated run, and when: `decode:0@600`, `l2:0.0@600-900`.

    prefill:I  decode:I   the I-th instance: what ran there goes on elsewhere, from the pool or recomputed
    node:N                every instance with NPUs in the node, and the node's share of the pool
    pool:N                the pool server of node N: the blocks in its DRAM are gone
    l1:… l2:… optic:… nic:… FROM>TO    components of the fabric, named as in `fabric.topology`

`@START` is the virtual second; with `-END` it works again (empty) from then on.
"""

import re
from dataclasses import dataclass
from typing import Literal

from app.twin.errors import TwinError

FaultKind = Literal["prefill", "decode", "node", "pool", "fabric"]

_FORM = re.compile(r"(?P<what>[^@]+)@(?P<start>\d+(?:\.\d+)?)(?:-(?P<end>\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that breaks. `index` counts instances or nodes from 0; `component` names a part of the fabric."""

    kind: FaultKind
    at_s: float
    until_s: float | None = None
    index: int = 0
    component: str = ""

    def __str__(self) -> str:
        what = self.component or f"{self.kind}:{self.index}"
        return f"{what}@{self.at_s:g}" + (f"-{self.until_s:g}" if self.until_s is not None else "")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """All faults of a comma-separated list. Raises `TwinError` quoting the one that cannot be read."""
    return tuple(_parse(word.strip()) for word in text.split(",") if word.strip())


def _parse(word: str) -> Fault:
    form = _FORM.fullmatch(word)
    if form is None:
        raise TwinError(
            f"faults: {word!r} is not WHAT@START or WHAT@START-END, such as decode:0@600 or l2:0.0@600-900 (seconds)"
        )
    start_s = float(form["start"])
    end_s = float(form["end"]) if form["end"] is not None else None
    if end_s is not None and end_s <= start_s:
        raise TwinError(f"faults: {word!r} ends before it begins")
    kind, _, number = form["what"].partition(":")
    for known in ("prefill", "decode", "node", "pool"):
        if kind == known:
            if not (number.isascii() and number.isdecimal()):
                raise TwinError(f"faults: {word!r} needs a whole number after {kind}:")
            return Fault(known, start_s, end_s, index=int(number))
    return Fault("fabric", start_s, end_s, component=form["what"])
