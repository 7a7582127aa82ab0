"""A worker process's inside: model, engine thread, links and directory entry, tied to one life.

    starting ──> ready <──> draining ──> ended
                  role change: draining, then ready again in the new role

The HTTP server is up from `starting` on; the directory says in which state the worker is, and only a ready one is
given work.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from engine.carrier import Pool
from engine.config import KVLayout
from engine.courtesy import Courtesy
from engine.grammar import GrammarCompiler, GrammarError, Matcher
from engine.kernels import idle_compiler
from engine.links import Links
from engine.membership import Membership
from engine.metrics import WorkerMetrics
from engine.model import Model
from engine.protocol import (
    Cancel,
    Failed,
    Location,
    Prefetch,
    Role,
    Submit,
    WorkerRecord,
    WorkerState,
)
from engine.scheduler import Limits
from engine.sequence import KeyScheme, Sequence
from engine.speculation import Drafter
from engine.step import Forward
from engine.vocabulary import read_vocabulary
from engine.weights import ModelFileError
from engine.worker import Load, Worker
from fabric.topology import DIES_PER_NODE, DIES_PER_NPU
from memory_pool.block import BlockFormat
from memory_pool.client import PoolClient
from memory_pool.directory import AsyncDirectory
from memory_pool.disk_tier import DiskReader
from memory_pool.store import NoStore
from observe.traces import Mode, new_tracer

log = logging.getLogger(__name__)

_POLL_S = 0.01
_FLUSH_S = 2.0
_JOIN_S = 5.0

PublishTime = Literal["auto", "early", "late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a worker process was asked to be. `threads`: of the model's kernels."""

    id: str
    role: Role
    model: str
    model_path: Path
    location: Location
    redis_url: str
    threads: int
    kv_bytes: int
    limits: Limits
    max_context_tokens: int | None = None
    kernels: str = "auto"
    speculate: bool = True
    pool_disk: Path | None = None
    """Folder of the pool's disk tier, if this machine has one."""
    use_pool: bool = True
    """False: KV is neither read from the pool nor written to it."""
    publish: PublishTime = "auto"
    """When KV of a prompt that is handed over leaves: while the rest is computed (`early`), or after the first token.

    `auto` is early where the kernels leave a core to do it.
    """
    traces: Mode = "off"
    """Where spans of traced requests go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A loaded model with its KV cache, as far as a worker needs to know them."""

    forward: Forward
    memory: Callable[[int], memoryview]
    close: Callable[[], None]
    layout: KVLayout
    fingerprint: str
    num_blocks: int
    max_context_tokens: int
    grammars: GrammarCompiler


def load_engine(options: Options) -> Engine:
    """Load the model of `options` and make a cache of as many whole blocks as `kv_bytes` hold.

    Raises what `Model.load` raises, and ValueError when `kv_bytes` does not hold a single block.
    """
    model = Model.load(options.model_path, num_threads=options.threads, kernels=options.kernels)
    idle_compiler.give_back()
    config = model.config
    layout = KVLayout(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    num_blocks = options.kv_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ValueError(f"--kv-bytes {options.kv_bytes}: one block of this model takes {layout.block_bytes}")
    cache = model.new_cache(num_blocks)
    return Engine(
        forward=lambda batch: model.forward(batch, cache),
        memory=cache.block,
        close=model.close,
        layout=layout,
        fingerprint=model.fingerprint,
        num_blocks=num_blocks,
        max_context_tokens=min(
            options.max_context_tokens or config.max_context_tokens, config.max_context_tokens
        ),
        grammars=GrammarCompiler(
            lambda: read_vocabulary(options.model_path),
            vocab_size=config.vocab_size,
            eos_ids=config.eos_token_ids,
        ),
    )


def pool_client(options: Options, engine: Engine) -> PoolClient:
    """The pool of this worker's model."""
    layout = engine.layout
    return PoolClient(
        options.redis_url if options.use_pool else NoStore(),
        BlockFormat(
            fingerprint=engine.fingerprint,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_tokens=layout.block_tokens,
            payload_bytes=layout.block_bytes,
        ),
        disk=DiskReader(options.pool_disk) if options.pool_disk and options.use_pool else None,
    )


def publishes_early(publish: PublishTime, threads: int, num_cores: int) -> bool:
    """What `Options.publish` means for so many kernel threads on so many cores."""
    return publish == "early" or (publish == "auto" and threads < num_cores)


def die_of(location: Location) -> str:
    """The place of the supernode that a location stands for, e.g. `die:17`."""
    return f"die:{location.node * DIES_PER_NODE + location.npu * DIES_PER_NPU + location.die}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerService:
    """One worker. Its methods belong to the event loop's thread; `ended` is set when the process should go."""

    def __init__(
        self,
        options: Options,
        *,
        url: str,
        load: Callable[[Options], Engine] = load_engine,
        make_pool: Callable[[Options, Engine], Pool] = pool_client,
    ) -> None:
        self.options = options
        self.url = url
        self.role: Role = options.role
        self.state: WorkerState = "starting"
        self.ended = asyncio.Event()
        self.failure: BaseException | None = None
        self.metrics = WorkerMetrics(options.model, options.id)
        self._tracer = new_tracer(options.traces, service="cloudmatrix-worker", instance=options.id)
        self.links = Links(on_message=self._on_message, on_closed=self._on_closed)
        self._load = load
        self._make_pool = make_pool
        self._engine: Engine | None = None
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._scheme: KeyScheme | None = None
        self._grammar_threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: dict[tuple[str, str], list[Cancel | Prefetch]] = {}
        """What came for requests while their grammars were being compiled; it is heeded afterwards."""
        self._membership = Membership(AsyncDirectory(options.redis_url), self.record)
        self._announcing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the model and be ready. Raises what loading raises."""
        self._announcing = asyncio.create_task(self._membership.run())
        began = time.monotonic()
        options = self.options
        engine = self._engine = await asyncio.to_thread(self._load, options)
        loop = asyncio.get_running_loop()
        self._scheme = KeyScheme(engine.fingerprint, engine.layout.block_tokens)
        self._worker = Worker(
            worker_id=options.id,
            place=die_of(options.location),
            forward=engine.forward,
            memory=engine.memory,
            num_blocks=engine.num_blocks,
            block_tokens=engine.layout.block_tokens,
            max_context_tokens=engine.max_context_tokens,
            pool=self._make_pool(options, engine),
            limits=options.limits,
            metrics=self.metrics,
            drafter=Drafter() if options.speculate else None,
            courtesy=Courtesy.of_process(),
            deliver=partial(_call_soon, loop, self.links.send),
            tracer=self._tracer,
            publishes_early=publishes_early(options.publish, options.threads, _num_cores()),
        )
        self._thread = threading.Thread(
            target=self._run, args=(self._worker, loop), name="engine", daemon=True
        )
        self._thread.start()
        self._grammar_threads.submit(engine.grammars.warm)
        self._be("ready")
        log.info(
            "ready as %s after %.1f s, %d KV blocks", self.role, time.monotonic() - began, engine.num_blocks
        )

    async def drain(self, deadline_s: float | None = None) -> None:
        """Take nothing new and finish what there is, or give it up after `deadline_s`. Returns when idle."""
        self._be("draining")
        if self._worker is None:
            return
        self._worker.is_draining = True
        give_up_at = None if deadline_s is None else time.monotonic() + deadline_s
        while not self._worker.is_idle and self.failure is None:
            if give_up_at is not None and time.monotonic() >= give_up_at:
                log.warning("still busy after %.0f s, given up: %s", deadline_s, self._worker.load())
                break
            await asyncio.sleep(_POLL_S)
        await self.links.flush(_FLUSH_S)

    def begin_exit(self, deadline_s: float | None = None) -> None:
        """Drain, then end. Asked a second time, end at once."""
        if self.state == "draining":
            self.ended.set()
        else:
            self._spawn(self._drain_and_end(deadline_s))

    def begin_role(self, role: Role) -> None:
        """Drain, then go on as `role`. Raises ValueError unless the worker is ready."""
        if self.state != "ready":
            raise ValueError(f"the worker is {self.state}; a role is changed when it is ready")
        if role != self.role:
            self._spawn(self._change_role(role))

    async def close(self) -> None:
        """Leave the directory and end the threads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._membership.stop()
        if self._announcing is not None:
            await self._announcing
        await self._membership.leave()
        if self._worker is not None and self._thread is not None:
            self._worker.stop()
            await asyncio.to_thread(self._thread.join, _JOIN_S)
        self._grammar_threads.shutdown(cancel_futures=True)
        if self._engine is not None:
            self._engine.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    def record(self) -> WorkerRecord:
        """What the worker announces."""
        engine, worker, options = self._engine, self._worker, self.options
        load = (
            worker.load()
            if worker
            else Load(running=0, waiting=0, queued_tokens=0, kv_blocks_used=0, kv_blocks_total=0)
        )
        return WorkerRecord(
            id=options.id,
            role=self.role,
            state=self.state,
            model=options.model,
            fingerprint=engine.fingerprint if engine else "",
            pid=os.getpid(),
            url=self.url,
            location=options.location,
            block_tokens=engine.layout.block_tokens if engine else 0,
            kv_bytes_per_token=engine.layout.bytes_per_token if engine else 0,
            max_context_tokens=worker.max_context_tokens if worker else 0,
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
        )

    def _run(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        try:
            worker.run()
        except BaseException as error:
            # A loop that died cannot serve or drain; whoever started this process starts another.
            log.exception("the engine thread died")
            self.failure = error
            _call_soon(loop, self.ended.set)

    def _on_message(self, link: str, message: Submit | Cancel | Prefetch, received_at: float) -> None:
        worker = self._worker
        match message:
            case Submit() if worker is None or self._scheme is None:
                failed = Failed(
                    request_id=message.request_id, code="overloaded", message="the worker is starting"
                )
                self.links.send({link: [failed]})
            case Submit() if message.sampling.grammar is not None:
                self._compiling[link, message.request_id] = []
                self._spawn(self._compile(link, message, message.sampling.grammar, received_at))
            case Submit():
                self._submit(link, message, None, received_at)
            case Cancel() | Prefetch() if (link, message.request_id) in self._compiling:
                self._compiling[link, message.request_id].append(message)
            case Cancel() if worker is not None:
                worker.cancel(link, message.request_id)
            case Prefetch() if worker is not None:
                worker.prefetch(link, message)

    async def _compile(self, link: str, message: Submit, grammar: str, received_at: float) -> None:
        """Compile a request's grammar beside the event loop, then take the request in."""
        engine = self._engine
        assert engine is not None
        loop = asyncio.get_running_loop()
        try:
            matcher = await loop.run_in_executor(self._grammar_threads, engine.grammars.compile, grammar)
        except (GrammarError, ModelFileError) as error:
            self._compiling.pop((link, message.request_id), None)
            failed = Failed(
                request_id=message.request_id,
                code="invalid" if isinstance(error, GrammarError) else "internal",
                message=f"its grammar: {error}",
            )
            self.links.send({link: [failed]})
            return
        held_back = self._compiling.pop((link, message.request_id), None)
        if held_back is None:
            return  # the link was closed meanwhile
        self._submit(link, message, matcher, received_at)
        for later in held_back:
            self._on_message(link, later, received_at)

    def _submit(self, link: str, message: Submit, matcher: Matcher | None, received_at: float) -> None:
        assert self._worker is not None
        assert self._scheme is not None
        self._worker.submit(
            Sequence.from_submit(
                message, link=link, scheme=self._scheme, received_at=received_at, matcher=matcher
            )
        )

    def _on_closed(self, link: str) -> None:
        for identity in [one for one in self._compiling if one[0] == link]:
            del self._compiling[identity]
        if self._worker is not None:
            self._worker.close_link(link)

    async def _drain_and_end(self, deadline_s: float | None) -> None:
        await self.drain(deadline_s)
        self.ended.set()

    async def _change_role(self, role: Role) -> None:
        await self.drain()
        self.role = role
        if self._worker is not None:
            self._worker.is_draining = False
        self._be("ready")

    def _be(self, state: WorkerState) -> None:
        self.state = state
        self._membership.announce_now()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    # A loop that is closed has nobody left to tell.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
