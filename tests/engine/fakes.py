"""A model whose logits are a pure function of the token history READ BACK FROM the KV cache, and a bench around a
worker that runs it. Any block that is missing, stale, misplaced or damaged changes every token that follows."""

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.grammar import GrammarCompiler
from engine.metrics import WorkerMetrics
from engine.model import StepBatch
from engine.parcels import Job
from engine.protocol import (
    Failed,
    Finished,
    FromWorker,
    Handoff,
    Prefilled,
    Report,
    SamplingParams,
    Submit,
    Tokens,
)
from engine.scheduler import Limits
from engine.sequence import KeyScheme, Sequence
from engine.speculation import Drafter
from engine.vocabulary import Vocabulary
from engine.worker import Worker
from memory_pool.block import BlockFormat
from memory_pool.client import PoolClient
from memory_pool.store import Get, MemoryStore, Put, Store, StoreError

VOCAB = 64
BLOCK_TOKENS = 4
SLOT_BYTES = 8
"""Token id and position, 4 bytes each."""
FINGERPRINT = "fa4e"
FORMAT = BlockFormat(
    fingerprint=FINGERPRINT,
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    block_tokens=BLOCK_TOKENS,
    payload_bytes=BLOCK_TOKENS * SLOT_BYTES,
)
SCHEME = KeyScheme(FINGERPRINT, BLOCK_TOKENS)
EOS = 0
LETTERS = [
    b"",
    *(bytes([c]) for c in b'{}[]":, .-0123456789abcdefghijklmnopqrstuvwxyz'),
    b'{"',
    b'": ',
    b"true",
]
"""The fake model's words: token 0 ends an answer, those beyond this list stand for nothing."""
GRAMMARS = GrammarCompiler(
    lambda: Vocabulary([*LETTERS, *[b""] * (VOCAB - len(LETTERS))], frozenset({EOS})),
    vocab_size=VOCAB,
    eos_ids=[EOS],
)


def _logits(history: bytes) -> npt.NDArray[np.float32]:
    return np.random.default_rng(zlib.crc32(history)).normal(size=VOCAB).astype(np.float32)


class FakeModel:
    """`forward` writes each row's token and position into its slot and reads the whole history back."""

    def __init__(self, num_blocks: int) -> None:
        # Nothing that was never written looks like a token.
        self.memory_array = np.full((num_blocks, BLOCK_TOKENS, 2), -1, np.int32)
        self.num_rows = 0
        self.num_steps = 0
        self.forward_delay_s = 0.0
        self.fail_next = False
        self.during: Callable[[], None] | None = None
        """Called once in the midst of a step."""

    def memory(self, block: int) -> memoryview:
        return memoryview(self.memory_array[block]).cast("B")

    def forward(self, batch: StepBatch) -> npt.NDArray[np.float32]:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake was told to fail")
        time.sleep(self.forward_delay_s)
        if self.during is not None:
            during, self.during = self.during, None
            during()
            time.sleep(0.002)
        self.num_steps += 1
        self.num_rows += len(batch.tokens)
        wanted = set(batch.logit_rows.tolist())
        logits = []
        for index in range(len(batch.first_position)):
            begin, end = int(batch.query_start[index]), int(batch.query_start[index + 1])
            table = batch.block_tables[index]
            for row in range(begin, end):
                position = int(batch.first_position[index]) + row - begin
                block, slot = table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                self.memory_array[block, slot] = (batch.tokens[row], position)
                if row in wanted:
                    used = table[: position // BLOCK_TOKENS + 1]
                    history = self.memory_array[used].reshape(-1, 2)[: position + 1]
                    logits.append(_logits(history.tobytes()))
        return np.stack(logits) if logits else np.zeros((0, VOCAB), np.float32)


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation, computed without any cache."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(row_logits(tokens))))
    return tokens[len(prompt) :]


def row_logits(tokens: list[int]) -> npt.NDArray[np.float32]:
    """What the model says behind `tokens`, computed without any cache."""
    return _logits(np.array([(t, p) for p, t in enumerate(tokens)], np.int32).tobytes())


class FaultyStore:
    """A store with faults that a test switches on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_down = False
        self.lose: set[bytes] = set()

    def _check(self) -> None:
        if self.is_down:
            raise StoreError("down")

    def get_many(self, gets: Items[Get]) -> Iterator[int | None]:
        self._check()
        for get in gets:
            yield None if get.key in self.lose else next(iter(self._store.get_many([get])))

    def put_many(self, puts: Iterable[Put]) -> list[bool]:
        self._check()
        return self._store.put_many(puts)

    def count_prefix(self, keys: Items[bytes]) -> int:
        self._check()
        return self._store.count_prefix(keys)

    def exists(self, keys: Items[bytes]) -> list[bool]:
        self._check()
        return self._store.exists(keys)

    def delete(self, keys: Items[bytes]) -> int:
        self._check()
        return self._store.delete(keys)

    def lease(self, keys: Items[bytes], holder: str, ttl_s: float) -> int:
        self._check()
        return self._store.lease(keys, holder, ttl_s)

    def release(self, keys: Items[bytes], holder: str, ttl_s: float) -> None:
        self._check()
        self._store.release(keys, holder, ttl_s)

    def evict(self, keys: Items[bytes], *, even_pinned: bool = False) -> list[bool]:
        return self._store.evict(keys, even_pinned=even_pinned)

    def close(self) -> None:
        self._store.close()


class ManualThreads:
    """In place of the IO threads: jobs run when, and in the order in which, the test says."""

    def __init__(self) -> None:
        self.pending: list[tuple[Callable[[Job], None], Job]] = []

    def submit(self, run: Callable[[Job], None], job: Job) -> None:
        self.pending.append((run, job))

    def run_one(self, index: int = 0) -> None:
        run, job = self.pending.pop(index)
        run(job)

    def shutdown(self, **_: Any) -> None:
        self.pending.clear()


class Bench:
    """A worker on the fake model, driven turn by turn in the test's own thread; `events` are those of each request."""

    def __init__(
        self,
        *,
        store: Store | None = None,
        num_blocks: int = 64,
        manual: bool = False,
        max_context_tokens: int = 10_000,
        worker_id: str = "w",
        clock: Callable[[], float] = time.perf_counter,
        drafter: Drafter | None = None,
        publishes_early: bool = True,
        **limits: Any,
    ) -> None:
        self.model = FakeModel(num_blocks)
        self.store = store or MemoryStore()
        self.pool = PoolClient(self.store, FORMAT)
        self.events: defaultdict[str, list[FromWorker]] = defaultdict(list)
        self.clock = clock
        self.worker = Worker(
            worker_id=worker_id,
            place="die:3",
            forward=self.model.forward,
            memory=self.model.memory,
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            max_context_tokens=max_context_tokens,
            pool=self.pool,
            limits=Limits(
                **{"max_step_tokens": 32, "mixed_prefill_tokens": 8, "min_prefill_tokens": 4, **limits}
            ),
            metrics=WorkerMetrics("fake", worker_id),
            deliver=self._deliver,
            drafter=drafter,
            clock=clock,
            publishes_early=publishes_early,
        )
        self.io = ManualThreads()
        if manual:
            for threads in self.handoff._threads.values():
                threads.shutdown()
            self.handoff._threads = {"in": self.io, "out": self.io}  # type: ignore[dict-item]  # same verbs

    @property
    def handoff(self) -> Any:
        return self.worker._handoff

    @property
    def blocks(self) -> Any:
        return self.worker._blocks

    def submit(self, request_id: str, prompt: list[int], *, link: str = "link", **fields: Any) -> None:
        sampling = {"max_tokens": 8, "seed": 1, "temperature": 0.0, **fields.pop("sampling", {})}
        submit = Submit(
            request_id=request_id,
            prompt_tokens=prompt,
            sampling=SamplingParams(**sampling),
            **{"phase": "both", **fields},
        )
        grammar = submit.sampling.grammar
        matcher = None if grammar is None else GRAMMARS.compile(grammar)
        self.worker.submit(
            Sequence.from_submit(submit, link=link, scheme=SCHEME, received_at=self.clock(), matcher=matcher)
        )

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.worker.turn()

    def finish(self, *request_ids: str, timeout_s: float = 20) -> None:
        """Turn until these requests are over and the worker is idle."""
        deadline = time.monotonic() + timeout_s
        while not (all(self.is_over(r) for r in request_ids) and self.worker.is_idle):
            assert time.monotonic() < deadline, f"not over: {[r for r in request_ids if not self.is_over(r)]}"
            while self.io.pending:
                self.io.run_one()
            if not self.worker.turn():
                time.sleep(0.0005)

    def is_over(self, request_id: str) -> bool:
        return any(isinstance(e, Finished | Failed | Prefilled) for e in self.events.get(request_id, []))

    def tokens(self, request_id: str) -> list[int]:
        return [t for e in self.events[request_id] if isinstance(e, Tokens) for t in e.token_ids]

    def last(self, request_id: str) -> FromWorker:
        return self.events[request_id][-1]

    def report(self, request_id: str) -> Report:
        last = self.last(request_id)
        assert isinstance(last, Finished | Prefilled)
        return last.report

    def names(self, request_id: str) -> Handoff:
        last = self.last(request_id)
        assert isinstance(last, Prefilled)
        return last.handoff

    def worker_keys(self, tokens: list[int]) -> list[bytes]:
        return SCHEME.keys(tokens, "default")

    def check_books(self) -> None:
        """No block is used, nothing is under way, and the block manager's books balance."""
        assert self.worker.is_idle
        assert self.blocks.num_used == 0
        assert not self.handoff.arriving
        self.blocks.check_integrity([])

    def close(self) -> None:
        self.worker.close()

    def _deliver(self, outbox: dict[str, list[FromWorker]]) -> None:
        for events in outbox.values():
            for event in events:
                self.events[event.request_id].append(event)
