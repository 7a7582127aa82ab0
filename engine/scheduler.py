"""What the next engine step computes: continuous batching with chunked prefill. Pure: no clock, no IO, no bytes.

    submit -> waiting -> (admit) -> loading -> (start) -> running -> (remove)
                 ^__________________________________________|  preempted

* Decode first: every sequence that lacks only its newest token gets a row in each step. Prompts fill what is left of
  the step's budget in chunks, oldest first, so nobody who reads along waits for someone's long prompt. Where nobody
  reads along, a prompt does not join others that are worth a step of their own: it would not end sooner, and they
  would end later.
* Answers that were begun elsewhere join a few at a time: those that begin together end together, and the prompts that
  their users send next would come together and wait for each other.
* With a TPOT target the budget is what a learned model of step times leaves beside the decode rows, and no more
  sequences are admitted than can decode together within the target.
* Admission takes all blocks of the known tokens at once and keeps one free block for each running sequence. When
  decode runs out of blocks nevertheless, the youngest sequence of the lowest priority gives its blocks back and waits
  again; its tokens stay, its named blocks stay until someone needs the room.
* A block that another sequence computed meanwhile, or computes in this very step, is shared instead of computed again.

The digital twin runs this class on virtual time.
"""

from bisect import insort
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from engine.block_manager import BlockManager
from engine.step_time import StepTimeModel


class Work(Protocol):
    """What the scheduler needs to know of a sequence. `priority`: lower goes first, as in vLLM's API."""

    priority: int
    arrived_at: float
    expires_at: float | None
    num_computed: int
    blocks: list[int]
    keys: list[bytes]
    draft: list[int]

    @property
    def computes_all(self) -> bool:
        """Whether its KV must be computed even where it is cached: what each row says is wanted."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and generated."""
        ...

    @property
    def num_generated(self) -> int:
        """Tokens of the answer that are known."""
        ...

    @property
    def num_uncomputed(self) -> int:
        """Known tokens without KV."""
        ...


W = TypeVar("W", bound=Work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker may take on."""

    max_running: int = 64
    """Sequences that hold blocks at a time."""
    max_waiting: int = 1024
    max_step_tokens: int = 128
    """Rows of a step without decode rows."""
    mixed_prefill_tokens: int = 64
    """Prefill rows beside decode rows when there is no TPOT target."""
    min_prefill_tokens: int = 16
    """Prefill rows beside decode rows even when the TPOT target leaves no room, so that prompts move on."""
    tpot_target_s: float | None = None
    fills_steps: bool = False
    """Whether prompts join until a step is full, even where there are rows enough without them."""
    joining_share: int | None = 8
    """For so many that decode one answer begun elsewhere may join them in a step, and one in any case; None: all."""


@dataclass(frozen=True, slots=True)
class Slot(Generic[W]):
    """A sequence's part in a step: its next `num_rows` tokens, of which the last `num_draft` are guesses."""

    work: W
    num_rows: int
    num_draft: int = 0


@dataclass(slots=True)
class Plan(Generic[W]):
    """One engine step. `num_attended`: context tokens summed over all rows."""

    slots: list[Slot[W]] = field(default_factory=list)
    preempted: list[W] = field(default_factory=list)
    num_decode: int = 0
    num_prefill: int = 0
    num_attended: int = 0


def _seniority(work: Work) -> tuple[int, float]:
    return work.priority, work.arrived_at


class Scheduler(Generic[W]):
    """Queues of one worker over its blocks."""

    def __init__(self, blocks: BlockManager, limits: Limits, step_time: StepTimeModel | None = None) -> None:
        self.blocks = blocks
        self.limits = limits
        self.step_time = step_time or StepTimeModel()
        self.waiting: list[W] = []
        self.loading: list[W] = []
        self.running: list[W] = []
        self._joining: list[W] = []
        """Of `running`: answers begun elsewhere that have had no row yet."""

    @property
    def is_full(self) -> bool:
        """Whether the waiting queue takes no more."""
        return len(self.waiting) >= self.limits.max_waiting

    @property
    def has_joining(self) -> bool:
        """Whether answers wait for a later step to join in."""
        return bool(self._joining)

    @property
    def queued_tokens(self) -> int:
        """Known tokens that are still to be computed, less the one each decoding sequence is about to run."""
        uncomputed = sum(w.num_uncomputed for queue in (self.waiting, self.loading) for w in list(queue))
        return uncomputed + sum(w.num_uncomputed - 1 for w in list(self.running))

    def submit(self, work: W) -> None:
        """Queue a new or preempted sequence behind its seniors."""
        insort(self.waiting, work, key=_seniority)

    def expire(self, now: float) -> list[W]:
        """Take out those that waited too long to be begun."""
        expired = [w for w in self.waiting if w.expires_at is not None and w.expires_at <= now]
        if expired:
            self.waiting = [w for w in self.waiting if w.expires_at is None or w.expires_at > now]
        return expired

    def admit(self, arriving: Container[bytes] = ()) -> list[W]:
        """Give blocks to waiting sequences while there is room; their `num_computed` counts the shared ones.

        `arriving` are names of blocks on their way into the cache: whoever would need one next waits for it instead of
        fetching it again, and lets others pass. Nobody else is overtaken.
        """
        admitted: list[W] = []
        for work in list(self.waiting):
            active = len(self.running) + len(self.loading)
            if active >= self._max_active():
                break
            reusable = self._reusable(work)
            shared = self.blocks.match(reusable)
            if len(shared) < len(reusable) and reusable[len(shared)] in arriving:
                continue
            need = self.blocks.blocks_for(work.num_tokens) - len(shared)
            if need + active > self.blocks.num_available_beside(shared):
                break
            self.blocks.hold(shared)
            fresh = self.blocks.allocate(need)
            assert fresh is not None
            work.blocks = [*shared, *fresh]
            work.num_computed = len(shared) * self.blocks.block_tokens
            work.expires_at = None
            self.waiting.remove(work)
            self.loading.append(work)
            admitted.append(work)
        return admitted

    def start(self, work: W) -> None:
        """Let an admitted sequence take part in steps: what can be loaded of its KV is loaded."""
        self.loading.remove(work)
        self.advance(work)
        insort(self.running, work, key=_seniority)
        if work.num_generated and work.num_uncomputed == 1:
            self._joining.append(work)

    def plan(self) -> Plan[W]:
        """Choose the next step's rows; sequences preempted for it are back in the waiting queue."""
        plan: Plan[W] = Plan()
        self._plan_decode(plan)
        self._plan_prefill(plan)
        return plan

    def advance(self, work: W) -> int:
        """Take over blocks that already hold the next tokens of `work`; how many tokens that came to."""
        block_tokens = self.blocks.block_tokens
        before = work.num_computed
        while not work.computes_all and work.num_computed % block_tokens == 0:
            index = work.num_computed // block_tokens
            if index >= len(work.keys) or (index + 1) * block_tokens >= work.num_tokens:
                break
            block = self.blocks.find(work.keys[index])
            if block is None:
                break
            if block != work.blocks[index]:
                self.blocks.hold([block])
                self.blocks.release([work.blocks[index]])
                work.blocks[index] = block
            work.num_computed += block_tokens
        return work.num_computed - before

    def commit(self, work: W, num_rows: int) -> range:
        """Note that KV of the next `num_rows` tokens is computed; the indices of blocks that got full."""
        block_tokens = self.blocks.block_tokens
        first = work.num_computed // block_tokens
        work.num_computed += num_rows
        filled = range(first, work.num_computed // block_tokens)
        for index in filled:
            self.blocks.seal(work.blocks[index], work.keys[index])
        return filled

    def remove(self, work: W) -> None:
        """Take a sequence out, wherever it is, and release its blocks."""
        for queue in (self.running, self.loading, self.waiting):
            if work in queue:
                queue.remove(work)
        self._give_back(work)

    def _plan_decode(self, plan: Plan[W]) -> None:
        decoding = [w for w in self.running if w.num_uncomputed == 1]
        self._joining = self._not_yet_joining(decoding)
        for work in decoding:
            if work in self._joining or work in plan.preempted or not self._make_room(work, plan):
                continue
            num_draft = self._room_for_draft(work)
            plan.slots.append(Slot(work, 1 + num_draft, num_draft))
            plan.num_decode += 1 + num_draft
            plan.num_attended += _attended(work.num_computed, 1 + num_draft)

    def _not_yet_joining(self, decoding: list[W]) -> list[W]:
        """Those that do not join in this step."""
        share = self.limits.joining_share
        if share is None or not self._joining:
            return []
        joining = [w for w in self._joining if w in decoding]
        return joining[max(1, (len(decoding) - len(joining)) // share) :]

    def _plan_prefill(self, plan: Plan[W]) -> None:
        budget = self._prefill_budget(plan)
        fills = self.limits.fills_steps or plan.num_decode > 0
        prompts = [w for w in self.running if w.num_uncomputed > 1]
        enough = budget if fills else self.step_time.enough_prefill_rows(len(prompts))
        claimed: set[bytes] = set()
        block_tokens = self.blocks.block_tokens
        for work in prompts:
            if budget <= 0 or plan.num_prefill >= enough:
                break
            self.advance(work)
            first = work.num_computed // block_tokens
            if first < len(work.keys) and work.keys[first] in claimed:
                continue
            rows = self._chunk(work, min(work.num_uncomputed, budget))
            claimed.update(work.keys[first : (work.num_computed + rows) // block_tokens])
            plan.slots.append(Slot(work, rows))
            plan.num_prefill += rows
            plan.num_attended += _attended(work.num_computed, rows)
            budget -= rows

    def _chunk(self, work: W, room: int) -> int:
        """Rows of the next chunk, at most `room`: up to a block that is here already, else to the end of a block,
        where what was computed can be published and shared."""
        block_tokens = self.blocks.block_tokens
        end = work.num_computed + room
        for index in range(work.num_computed // block_tokens + 1, min(end // block_tokens, len(work.keys))):
            if not work.computes_all and self.blocks.find(work.keys[index]) is not None:
                return index * block_tokens - work.num_computed
        if room < work.num_uncomputed:
            return max(end // block_tokens * block_tokens - work.num_computed, 0) or room
        return room

    def _prefill_budget(self, plan: Plan[W]) -> int:
        limits = self.limits
        if not plan.num_decode:
            return limits.max_step_tokens
        if limits.tpot_target_s is None:
            return limits.mixed_prefill_tokens
        fitting = self.step_time.prefill_rows_within(limits.tpot_target_s, plan.num_decode, plan.num_attended)
        return min(max(fitting, limits.min_prefill_tokens), limits.max_step_tokens)

    def _max_active(self) -> int:
        target_s = self.limits.tpot_target_s
        if target_s is None or not self.running:
            return self.limits.max_running
        attended = sum(w.num_computed for w in self.running) / len(self.running)
        return min(self.limits.max_running, self.step_time.decode_rows_within(target_s, attended))

    def _reusable(self, work: W) -> list[bytes]:
        """Names of blocks that may be taken over: at least one token is always computed, its logits are wanted."""
        if work.computes_all:
            return []
        return work.keys[: (work.num_tokens - 1) // self.blocks.block_tokens]

    def _make_room(self, work: W, plan: Plan[W]) -> bool:
        """A block for the next token of `work`, at the cost of its juniors; False when it had to give way itself."""
        while self.blocks.blocks_for(work.num_computed + 1) > len(work.blocks):
            block = self.blocks.allocate(1)
            if block is not None:
                work.blocks += block
                continue
            victim = self.running.pop()
            self._give_back(victim)
            victim.num_computed = 0
            victim.draft = []
            self.submit(victim)
            plan.preempted.append(victim)
            if victim is work:
                return False
        return True

    def _room_for_draft(self, work: W) -> int:
        """Draft rows for which there are blocks without anyone giving way."""
        if not work.draft:
            return 0
        missing = self.blocks.blocks_for(work.num_computed + 1 + len(work.draft)) - len(work.blocks)
        if missing > 0 and self.blocks.num_available - missing >= len(self.running):
            work.blocks += self.blocks.allocate(missing) or []
        room = len(work.blocks) * self.blocks.block_tokens - work.num_computed - 1
        return min(len(work.draft), room)

    def _give_back(self, work: W) -> None:
        self.blocks.release(work.blocks)
        work.blocks = []


def _attended(num_computed: int, num_rows: int) -> int:
    return num_rows * num_computed + num_rows * (num_rows + 1) // 2
