"""What really moved: bytes and measured seconds of live transfers beside the seconds modelled on UB and on
RoCE.

Measured and modelled never mix: `measured_s` is this machine's clock (None when nobody measured), `ub_s` and
`roce_s` are what `fabric.cost` says the same bytes take between the same places of a CloudMatrix384.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fabric.cost import path_cost
from fabric.topology import parse_place

DEEPSEEK_R1_KV_BYTES_PER_TOKEN = 70_272
"""61 layers of (512 + 64) 16-bit values (the model's public configuration: kv_lora_rank 512, rope 64)."""


@dataclass(frozen=True)
class Transfer:
    """Bytes that moved from one place of the supernode to another; `kind` says why, such as `fetch`."""

    kind: str
    src: str
    dst: str
    num_bytes: int
    measured_s: float | None
    ub_s: float
    roce_s: float


@dataclass(frozen=True)
class Totals:
    """Sums over transfers. `measured_s` sums only those that were measured; None when none was."""

    num_transfers: int = 0
    num_bytes: int = 0
    measured_s: float | None = None
    ub_s: float = 0.0
    roce_s: float = 0.0

    def plus(self, transfer: Transfer) -> "Totals":
        """The totals with one more transfer."""
        measured_s = self.measured_s
        if transfer.measured_s is not None:
            measured_s = (measured_s or 0.0) + transfer.measured_s
        return Totals(
            self.num_transfers + 1,
            self.num_bytes + transfer.num_bytes,
            measured_s,
            self.ub_s + transfer.ub_s,
            self.roce_s + transfer.roce_s,
        )


def price(kind: str, src: str, dst: str, num_bytes: int, measured_s: float | None = None) -> Transfer:
    """The ledger's entry for a transfer between places such as `die:3` and `cpu:7`.

    Each end is charged on an idle plane, without the start-up of an engine on either, so UB and RoCE stay
    comparable at every size. Raises `FabricError` for places that do not exist or are the same.
    """
    a, b = parse_place(src), parse_place(dst)
    ub = path_cost(a, b, "ub").seconds(num_bytes)
    roce = path_cost(a, b, "roce").seconds(num_bytes)
    return Transfer(kind, src, dst, num_bytes, measured_s, ub, roce)


def scaled(transfer: Transfer, kv_bytes_per_token: int, as_if_bytes_per_token: int) -> Transfer:
    """The transfer as if the same tokens had been another model's: modelled again, not measured.

    `kv_bytes_per_token` is what the live model stores, `as_if_bytes_per_token` the other's, such as
    `DEEPSEEK_R1_KV_BYTES_PER_TOKEN`.
    """
    num_bytes = round(transfer.num_bytes * as_if_bytes_per_token / kv_bytes_per_token)
    return replace(price(transfer.kind, transfer.src, transfer.dst, num_bytes), measured_s=None)


def total(transfers: Iterable[Transfer]) -> Totals:
    """The sum of some transfers."""
    totals = Totals()
    for transfer in transfers:
        totals = totals.plus(transfer)
    return totals


class Ledger:
    """Running totals of a process by kind of transfer. Thread-safe; keeps sums, never the transfers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_kind: dict[str, Totals] = {}

    def add(self, transfers: Iterable[Transfer]) -> None:
        """Enter transfers."""
        with self._lock:
            for transfer in transfers:
                self._by_kind[transfer.kind] = self._by_kind.get(transfer.kind, Totals()).plus(transfer)

    def by_kind(self) -> dict[str, Totals]:
        """Totals so far, by kind."""
        with self._lock:
            return dict(self._by_kind)

    def total(self) -> Totals:
        """Totals so far, all kinds together."""
        result = Totals()
        for part in self.by_kind().values():
            measured = [m for m in (result.measured_s, part.measured_s) if m is not None]
            result = Totals(
                result.num_transfers + part.num_transfers,
                result.num_bytes + part.num_bytes,
                sum(measured) if measured else None,
                result.ub_s + part.ub_s,
                result.roce_s + part.roce_s,
            )
        return result
