"""What became of one request: its phases on the gateway's clock, what moved, how it was routed, how it ended.

A worker reports its phases counted from the moment it received a Submit. They are laid on the gateway's clock from the
moment that Submit was sent, which is never later: no two clocks are compared, and the small time on the wire falls
before each phase. Work that a worker went on with after the answer had ended is cut at the end of the answer.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from app.admission.ticket import DEFAULT_TENANT
from app.routing.router import Route
from engine.protocol import Report, Reuse
from fabric.ledger import DEEPSEEK_R1_KV_BYTES_PER_TOKEN, Transfer, scaled, total

if TYPE_CHECKING:
    from app.requests.trace import RequestTrace

Status = Literal["queued", "running", "completed", "failed", "cancelled"]


class PhaseView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A phase, in seconds from the request's arrival. `where`: `gateway` or a worker's id; `choice`: of `n`."""

    phase: str
    start_s: float
    duration_s: float
    where: str
    choice: int = 0


class UsageView(msgspec.Struct, frozen=True):
    """Tokens of a request over all its choices; `cached_tokens` and `cache_write_tokens` are null while unknown."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    cache_write_tokens: int | None


class RouteView(msgspec.Struct, frozen=True):
    """Who served it and why. `attempts` counts the times it was sent to a worker to begin or to go on."""

    prefill_worker: str | None
    decode_worker: str | None
    reason: Any
    predicted_cached_tokens: int | None
    attempts: int


class ReuseView(msgspec.Struct, frozen=True):
    """What a worker (`where`) found of a choice's KV in the pool, behind its own blocks, and what it made of it.

    `fetch_s` and `compute_s` are predictions for all blocks found, one way and the other; the cheaper way was taken.
    `fetch_s` is null when the pool's speed was unknown, and it was tried. `miss_reason`: why the first block missing
    is missing (`never_seen`, `evicted`, `damaged`, `unavailable`, and for administrators `other_namespace`).
    """

    where: str
    choice: int
    found_blocks: int
    chosen_blocks: int
    fetched_blocks: int
    fetch_s: float | None
    compute_s: float
    miss_reason: str | None


class TotalsView(msgspec.Struct, frozen=True):
    """Sums over the transfers; `measured_s` is null when none was measured."""

    num_bytes: int
    measured_s: float | None
    ub_s: float
    roce_s: float


class AsIfView(msgspec.Struct, frozen=True):
    """What the same tokens would have moved and cost as another model's KV: modelled, nothing of it measured."""

    model: str
    kv_bytes_per_token: int
    num_bytes: int
    ub_s: float
    roce_s: float


class RecordView(msgspec.Struct, frozen=True):
    """Answer of `GET /api/requests/{id}`. Seconds count from arrival at the gateway."""

    request_id: str
    endpoint: str
    model: str
    created: int
    status: Status
    finish_reason: str | None
    finish_reasons: list[str | None]
    error: str | None
    stream: bool
    usage: UsageView
    route: RouteView
    reuse: list[ReuseView]
    ttft_s: float | None
    e2e_s: float | None
    timeline: list[PhaseView]
    transfers: list[Transfer]
    totals: TotalsView
    as_if: AsIfView | None
    """The totals at the size of DeepSeek-R1's KV; null until the request was given to a worker."""


class RequestRecord:
    """Collects what happens to a request; `view` is what others see. `now` is always the gateway's monotonic clock."""

    __slots__ = (
        "_all_reported",
        "_when_reported",
        "arrived_at",
        "attempts",
        "cached_tokens",
        "completion_tokens",
        "created",
        "created_s",
        "ended_at",
        "endpoint",
        "error",
        "finish_reasons",
        "first_token_at",
        "kv_bytes_per_token",
        "model",
        "num_choices",
        "num_open_legs",
        "num_retries",
        "phases",
        "predicted_cached_tokens",
        "prompt_tokens",
        "request_id",
        "reuses",
        "route",
        "status",
        "stream",
        "tenant",
        "trace",
        "transfers",
        "written_tokens",
    )

    def __init__(self, request_id: str, endpoint: str, created: int, arrived_at: float) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.created = created
        self.created_s = round(time.time() - (time.monotonic() - arrived_at), 3)
        """Unix time of arrival."""
        self.arrived_at = arrived_at
        self.model = ""
        self.tenant = DEFAULT_TENANT
        self.trace: RequestTrace | None = None
        """None when it is not traced."""
        self.stream = False
        self.num_choices = 1
        self.status: Status = "queued"
        self.error: str | None = None
        self.finish_reasons: dict[int, str] = {}
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens: int | None = None
        self.written_tokens: int | None = None
        self.predicted_cached_tokens: int | None = None
        self.route: Route | None = None
        self.kv_bytes_per_token: int | None = None
        self.attempts = 0
        self.num_open_legs = 0
        self._all_reported: asyncio.Event | None = None
        self._when_reported: Callable[[], None] | None = None
        self.num_retries = 0
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.phases: list[tuple[str, float, float, str, int]] = []
        self.transfers: list[Transfer] = []
        self.reuses: list[tuple[Reuse, str, int]] = []

    def add_phase(self, phase: str, started_at: float, ended_at: float) -> None:
        """A phase of the gateway's own."""
        self.phases.append((phase, started_at, ended_at - started_at, "gateway", 0))

    def add_report(self, report: Report, sent_at: float, choice: int) -> None:
        """A worker's part in the request, whose Submit left at `sent_at`."""
        for phase in report.phases:
            self.phases.append(
                (phase.phase, sent_at + phase.start_s, phase.duration_s, report.worker_id, choice)
            )
        self.transfers.extend(report.transfers)
        self.written_tokens = (self.written_tokens or 0) + report.written_tokens
        if report.reuse is not None:
            self.reuses.append((report.reuse, report.worker_id, choice))

    def begin_leg(self) -> None:
        """A Submit left for a worker, which will report or be lost."""
        self.num_open_legs += 1

    def end_leg(self) -> None:
        """A worker reported, declined or was lost."""
        self.num_open_legs -= 1
        if self.num_open_legs == 0:
            if self._all_reported is not None:
                self._all_reported.set()
            self._call_when_reported()

    def when_reported(self, call: Callable[[], None]) -> None:
        """Call once, as soon as the answer has ended and no worker owes a report."""
        self._when_reported = call
        if self.num_open_legs == 0:
            self._call_when_reported()

    def _call_when_reported(self) -> None:
        call, self._when_reported = self._when_reported, None
        if call is not None:
            call()

    async def reported(self) -> None:
        """Wait until no worker owes a report."""
        while self.num_open_legs:
            self._all_reported = self._all_reported or asyncio.Event()
            self._all_reported.clear()
            await self._all_reported.wait()

    def end(self, status: Status, now: float, error: str | None = None) -> None:
        """The answer is over; the first end counts."""
        if self.ended_at is None:
            self.status, self.ended_at, self.error = status, now, error

    def seconds_in(self, *phases: str) -> float | None:
        """Time the first choice spent in these phases on workers; None while no worker has said."""
        times = [row[2] for row in self.phases if row[0] in phases and row[3] != "gateway" and row[4] == 0]
        return sum(times) if times else None

    def view(self, *, for_admin: bool = True) -> RecordView:
        """The record now. What it says of other tenants is for administrators alone."""
        end_at = self.ended_at
        phases = [
            PhaseView(phase, _seconds(start - self.arrived_at), _seconds(cut), where, choice)
            for phase, start, duration, where, choice in sorted(self.phases, key=lambda row: row[1])
            if (cut := duration if end_at is None else min(duration, end_at - start)) >= 0
        ]
        totals = total(self.transfers)
        route = self.route
        reasons = [self.finish_reasons.get(index) for index in range(self.num_choices)]
        return RecordView(
            request_id=self.request_id,
            endpoint=self.endpoint,
            model=self.model,
            created=self.created,
            status=self.status,
            finish_reason=reasons[0],
            finish_reasons=reasons,
            error=self.error,
            stream=self.stream,
            usage=UsageView(
                self.prompt_tokens, self.completion_tokens, self.cached_tokens, self.written_tokens
            ),
            route=RouteView(
                None if route is None else route.prefill_worker or route.decode_worker,
                None if route is None else route.decode_worker,
                None if route is None else route.reason,
                self.predicted_cached_tokens,
                self.attempts,
            ),
            reuse=[
                ReuseView(
                    where,
                    choice,
                    reuse.found_blocks,
                    reuse.chosen_blocks,
                    reuse.fetched_blocks,
                    reuse.fetch_s,
                    reuse.compute_s,
                    reuse.miss_reason if for_admin else public_miss_reason(reuse.miss_reason),
                )
                for reuse, where, choice in self.reuses
            ],
            ttft_s=None if self.first_token_at is None else _seconds(self.first_token_at - self.arrived_at),
            e2e_s=None if end_at is None else _seconds(end_at - self.arrived_at),
            timeline=phases,
            transfers=list(self.transfers),
            totals=TotalsView(totals.num_bytes, totals.measured_s, totals.ub_s, totals.roce_s),
            as_if=self._as_deepseek_r1(),
        )

    def _as_deepseek_r1(self) -> AsIfView | None:
        if self.kv_bytes_per_token is None:
            return None
        size = DEEPSEEK_R1_KV_BYTES_PER_TOKEN
        totals = total(scaled(transfer, self.kv_bytes_per_token, size) for transfer in self.transfers)
        return AsIfView("deepseek-r1", size, totals.num_bytes, totals.ub_s, totals.roce_s)


def public_miss_reason(reason: str | None) -> str | None:
    """A reason that tells nobody what other tenants have: what only they have was, to the caller, never seen."""
    return "never_seen" if reason == "other_namespace" else reason


def _seconds(value: float) -> float:
    return round(value, 9)
