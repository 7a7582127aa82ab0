"""The gateway's loop around the autoscaler: look at the service, decide, turn one worker's role.

It lives in the gateway because everything it looks at is there already: the workers' records, and the requests under
way and just ended. Start it in one gateway only (`cloudmatrix up --autoscale` has one); two would each count the
other's change as the load's.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

import httpx
import msgspec

from app.matrix.autoscaler import (
    EVERY_S,
    MIN_TOKENS,
    RECENT_S,
    Change,
    Memory,
    Observation,
    Policy,
    WorkerLoad,
    decide,
    slow,
)
from app.requests.history import History
from app.requests.record import RequestRecord
from app.routing.workers import Worker, Workers

log = logging.getLogger(__name__)

RECORDS = 200
"""Newest records looked at."""
CHANGES_KEPT = 100


class Turned(msgspec.Struct, frozen=True):
    """A change that was made. `at`: seconds since the epoch; `error` is null when the worker agreed."""

    at: float
    worker: str
    role: str
    reason: str
    error: str | None


class Autoscaling(msgspec.Struct, frozen=True):
    """Answer of `GET /api/autoscaler`. Pressure 1: the side just meets its target. Null: never looked."""

    enabled: bool
    ttft_target_s: float
    tpot_target_s: float
    prefill_pressure: float | None
    decode_pressure: float | None
    changes: list[Turned]


class RoleSwitch:
    """Looks once a second while `run` is running. `view` says what it saw and did."""

    def __init__(
        self,
        workers: Workers,
        history: History,
        client: httpx.AsyncClient,
        policy: Policy,
        *,
        enabled: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._history = history
        self._client = client
        self._policy = policy
        self._enabled = enabled
        self._clock = clock
        self._memory = Memory()
        self._prefill_tokens_per_s: float | None = None
        self._pressures: tuple[float, float] | None = None
        self._changes: deque[Turned] = deque(maxlen=CHANGES_KEPT)

    async def run(self) -> None:
        """Look, decide and turn until cancelled; at once over when it is not enabled."""
        while self._enabled:
            await asyncio.sleep(EVERY_S)
            await self.look()

    async def look(self) -> Change | None:
        """One decision, carried out; the change, if there was one."""
        decision = decide(self._policy, self._memory, self._observe(self._clock()))
        self._memory = decision.memory
        self._pressures = decision.prefill_pressure, decision.decode_pressure
        if decision.change is not None:
            await self._turn(decision.change)
        return decision.change

    def view(self) -> Autoscaling:
        """What the loop sees and did, oldest change first."""
        prefill, decode = self._pressures or (None, None)
        policy = self._policy
        return Autoscaling(
            self._enabled, policy.ttft_target_s, policy.tpot_target_s, prefill, decode, list(self._changes)
        )

    def _observe(self, now: float) -> Observation:
        records = list(self._history.recent(RECORDS))
        rates = [rate for record in records if (rate := _prefill_rate(record)) is not None]
        if rates:
            self._prefill_tokens_per_s = median(rates)
        return Observation(
            now=now,
            workers=[_load(worker) for worker in self._workers.all() if worker.link.is_open],
            ttft_s=slow(_waits(records, now)),
            tpot_s=slow(_paces(records, now)),
            prefill_tokens_per_s=self._prefill_tokens_per_s,
        )

    async def _turn(self, change: Change) -> None:
        """Ask the worker as `POST /api/workers/{id}/role` does. A refusal is noted; the cooldown holds all the same."""
        worker = self._workers.get(change.worker_id)
        error = None if worker is not None else "it has gone"
        if worker is not None:
            url = f"{worker.record.url.rstrip('/')}/role"
            try:
                answer = await self._client.post(url, json={"role": change.role})
                error = answer.text[:200] if answer.is_error else None
            except httpx.HTTPError as failure:
                error = str(failure)
        self._changes.append(Turned(time.time(), change.worker_id, change.role, change.reason, error))
        if error is None:
            log.info("%s turns to %s: %s", change.worker_id, change.role, change.reason)
        else:
            log.warning("%s does not turn to %s: %s", change.worker_id, change.role, error)


def _load(worker: Worker) -> WorkerLoad:
    record = worker.record
    return WorkerLoad(
        worker_id=record.id,
        role=record.role,
        state=record.state,
        num_running=record.running,
        num_waiting=record.waiting,
        num_queued_tokens=max(record.queued_tokens, worker.prompt_tokens_sent),
        kv_share=record.kv_blocks_used / record.kv_blocks_total if record.kv_blocks_total else 0.0,
    )


def _waits(records: Iterable[RequestRecord], now: float) -> list[float]:
    """Seconds to first token: of requests that got it lately, and so far of those that still wait."""
    found = []
    for record in records:
        if record.first_token_at is None:
            if record.ended_at is None:
                found.append(now - record.arrived_at)
        elif now - record.first_token_at <= RECENT_S:
            found.append(record.first_token_at - record.arrived_at)
    return found


def _paces(records: Iterable[RequestRecord], now: float) -> list[float]:
    """Seconds per token after the first, of answers under way and of those that ended lately.

    An answer of several choices counts the tokens of all of them, so it is left out.
    """
    found = []
    for record in records:
        if record.first_token_at is None or record.num_choices > 1 or record.completion_tokens < MIN_TOKENS:
            continue
        end_at = now if record.ended_at is None else record.ended_at
        if now - end_at <= RECENT_S:
            found.append((end_at - record.first_token_at) / (record.completion_tokens - 1))
    return found


def _prefill_rate(record: RequestRecord) -> float | None:
    seconds = record.seconds_in("prefill")
    computed = record.prompt_tokens - (record.cached_tokens or 0)
    return computed / seconds if seconds and computed > 0 else None
