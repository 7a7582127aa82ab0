"""Carrying requests over their workers. `Dispatcher` knows what they share; each choice is one `Dispatch`."""

import asyncio
import time
from collections.abc import Callable, Sequence

from app.admission.gate import Gate
from app.errors import UnavailableError
from app.routing.dispatch import Dispatch, Work
from app.routing.local_blocks import LocalBlocks
from app.routing.peers import GatewayLoad, Peers
from app.routing.router import Demand, Route, route
from app.routing.scorers import Candidate
from app.routing.workers import Worker, Workers
from engine.protocol import WorkerRecord

TICK_S = 0.1


class Dispatcher:
    """Knows the workers and what is under way. One event loop; every method but `run` returns at once."""

    def __init__(
        self,
        workers: Workers,
        *,
        gate: Gate,
        failover_s: float,
        retry_after_s: float,
        clock: Callable[[], float] = time.monotonic,
        peers: Peers | None = None,
    ) -> None:
        self._peers = peers
        self.gate = gate
        self.clock = clock
        self.failover_s = failover_s
        self.retry_after_s = retry_after_s
        self._workers = workers
        self._parked: dict[Dispatch, None] = {}
        self.local_blocks = LocalBlocks()
        workers.on_change = self._workers_changed

    @property
    def num_parked(self) -> int:
        """Choices that wait for a worker to appear."""
        return len(self._parked)

    def layout(self, model: str) -> WorkerRecord:
        """The record of a worker of `model`, for what all its workers share: fingerprint and KV layout.

        Raises UnavailableError when none is known.
        """
        for worker in self._workers.all():
            if worker.record.model == model and worker.is_routable:
                return worker.record
        raise UnavailableError(f"no worker can serve {model} now", retry_after_s=self.retry_after_s)

    def prepare(self, works: Sequence[Work]) -> list[Dispatch]:
        """Choices of one prompt, which share one prefill: all go when the first is told to `begin`."""
        dispatches = [Dispatch(self, work) for work in works]
        dispatches[0].followers = dispatches[1:]
        return dispatches

    async def run(self) -> None:
        """Retry and time out what is parked, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._resume_parked()

    def candidates(self) -> list[Candidate]:
        """The workers as the router sees them."""
        return [_candidate(worker, self._peers) for worker in self._workers.all()]

    def load(self) -> GatewayLoad:
        """What this gateway has at the workers, as it tells the others."""
        admission = self.gate.admission
        return GatewayLoad(
            sequences=admission.num_sequences,
            prompt_tokens=admission.prompt_tokens,
            queued=admission.num_queued,
            workers={
                worker.record.id: (worker.link.num_in_flight, worker.prompt_tokens_sent)
                for worker in self._workers.all()
            },
        )

    def route(self, work: Work, avoid: Sequence[str]) -> Route | None:
        """The best route for a choice now."""
        candidates = self.candidates()
        num_local_tokens = {
            candidate.worker_id: self.local_blocks.count(candidate.worker_id, work.block_keys)
            * work.block_tokens
            for candidate in candidates
            if candidate.role != "decode"
        }
        return route(
            candidates,
            Demand(
                model=work.record.model,
                num_prompt_tokens=len(work.prompt_tokens),
                kv_bytes_per_token=work.kv_bytes_per_token,
                num_local_tokens=num_local_tokens,
                avoid=avoid,
            ),
        )

    def worker(self, worker_id: str) -> Worker | None:
        """The worker of that id, if it can take work."""
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.is_routable else None

    def remember_prefill(self, worker_id: str, block_keys: Sequence[bytes]) -> None:
        """These blocks now lie in the worker's own cache, until newer ones push them out; other gateways hear of it."""
        fresh = self._remember(worker_id, block_keys)
        if fresh and self._peers is not None:
            self._peers.tell(worker_id, fresh)

    def learn_prefill(self, worker_id: str, block_keys: Sequence[bytes]) -> None:
        """Another gateway says so of these blocks."""
        self._remember(worker_id, block_keys)

    def park(self, dispatch: Dispatch) -> None:
        """Keep a choice until a worker appears or its patience is over."""
        self._parked[dispatch] = None

    def unpark(self, dispatch: Dispatch) -> None:
        """The choice no longer waits."""
        self._parked.pop(dispatch, None)

    def _workers_changed(self) -> None:
        self._resume_parked()
        self.gate.changed()

    def _resume_parked(self) -> None:
        for dispatch in list(self._parked):
            dispatch.resume()

    def _remember(self, worker_id: str, block_keys: Sequence[bytes]) -> list[bytes]:
        worker = self._workers.get(worker_id)
        limit = worker.record.kv_blocks_total if worker else 0
        return self.local_blocks.remember(worker_id, block_keys, limit, self.clock())


def _candidate(worker: Worker, peers: Peers | None) -> Candidate:
    record = worker.record
    sequences, prompt_tokens = (0, 0) if peers is None else peers.at_worker(record.id)
    return Candidate(
        worker_id=record.id,
        role=record.role,
        state=record.state,
        is_connected=worker.link.is_open,
        model=record.model,
        location=record.location,
        max_context_tokens=record.max_context_tokens,
        num_sequences=max(record.running + record.waiting, worker.link.num_in_flight + sequences),
        num_queued_tokens=max(record.queued_tokens, worker.prompt_tokens_sent + prompt_tokens),
        kv_blocks_used=record.kv_blocks_used,
        kv_blocks_total=record.kv_blocks_total,
    )
