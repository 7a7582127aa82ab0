"""Which request goes next, which one waits, which one is refused or dropped. Pure: no IO, no clock; `now` is passed in.

    offer ──> released                  there is room and nobody waits
      ├─────> queued ──> released       by tier, then the least served tenant, then its own priority, then arrival
      │          └─────> lost           deadline passed, target out of reach, or displaced by a poorer tenant
      └─────> refused                   no room, or it would be lost anyway

Requests are held back here and not in the workers, whose queues know no tenants: released are as many as keep the
workers busy, by two measures, sequences under way and prompt tokens to be computed. The digital twin can run this
class on virtual time.
"""

from bisect import insort
from dataclasses import dataclass

from app.admission.concurrency import SequenceLimit
from app.admission.fair_share import FairnessWindow, VirtualTokenCounters
from app.admission.forecast import FirstToken, Throughput
from app.admission.ticket import OUTPUT_WEIGHT, Loss, Refusal, Ticket

MAX_WINDOW_TOKENS, FIRST_WINDOW_TOKENS, MIN_WINDOW_TOKENS = 8192, 512, 128
"""Prompt tokens that one prefill worker may have before it: at most, until its speed is known, and for all of them
together always. More than speed and target say would be waited for in the worker's queue, where nobody is turned away:
a slow worker would be late with every request that it was given. Fewer cost nothing, for the next prompt leaves as soon
as one is computed."""
WINDOW_SHARE = 0.25
"""The share of the TTFT target that a released request may spend behind others at the workers."""
ENTRY_SHARE = 0.8
"""The share of the TTFT target up to which a predicted first token is let in: forecasts err."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the workers may hold now, and what other gateways have there of it.

    `num_rivals`: other gateways that have anything under way or waiting. What is left over after theirs is this
    gateway's, and at least an equal share: one that came first cannot keep the others out.
    """

    max_sequences: int
    num_prefill_workers: int
    others_sequences: int = 0
    others_prompt_tokens: int = 0
    num_rivals: int = 0

    def left(self, whole: int, others: int) -> int:
        """Of `whole`, of which the others have that much, what is this gateway's."""
        return max(whole - others, whole // (1 + self.num_rivals))


@dataclass(frozen=True, slots=True)
class Refused:
    """`retry_after_s`: when it would probably be let in; None when that is not known."""

    reason: Refusal
    retry_after_s: float | None


@dataclass(slots=True)
class _Queue:
    """What one tenant has waiting."""

    tickets: list[Ticket]
    prompt_tokens: int = 0
    sequences: int = 0
    virtual_tokens: float = 0.0

    def count(self, ticket: Ticket, sign: int) -> None:
        self.prompt_tokens += sign * ticket.prompt_tokens
        self.sequences += sign * ticket.num_sequences
        self.virtual_tokens += sign * ticket.cost / ticket.weight


def _order(ticket: Ticket) -> tuple[int, float]:
    return ticket.priority, ticket.queued_at


class Admission:
    """The queues of one gateway. `max_requests` bounds requests waiting and under way together."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_queued_per_tenant: int,
        ttft_target_s: float,
        tpot_target_s: float | None,
    ) -> None:
        self._max_requests = max_requests
        self._max_queued_per_tenant = max_queued_per_tenant
        self._ttft_target_s = ttft_target_s
        self._queues: dict[tuple[int, str], _Queue] = {}
        self._released: set[Ticket] = set()
        self._mean_output: dict[str, float] = {}
        self._looked_at: float | None = None
        self.counters = VirtualTokenCounters()
        self.fairness = FairnessWindow()
        self.throughput = Throughput()
        self.first_token = FirstToken()
        self.sequence_limit = SequenceLimit(tpot_target_s)
        self.service: dict[str, float] = {}
        """Virtual tokens of choices that are over, by tenant."""
        self.num_sequences = 0
        """Sequences of released requests that are not over."""
        self.prompt_tokens = 0
        """Prompt tokens of released requests that are not computed."""
        self.num_uncomputed = 0
        """Released requests that have any of them."""

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return sum(len(queue.tickets) for queue in self._queues.values())

    @property
    def has_queued(self) -> bool:
        """Whether any request waits."""
        return bool(self._queues)

    @property
    def num_requests(self) -> int:
        """Requests that wait or are under way."""
        return self.num_queued + len(self._released)

    def queued_by_tenant(self) -> dict[str, int]:
        """Requests that wait, of each tenant that has any."""
        counts: dict[str, int] = {}
        for (_, tenant), queue in self._queues.items():
            counts[tenant] = counts.get(tenant, 0) + len(queue.tickets)
        return counts

    def offer(self, ticket: Ticket, capacity: Capacity, now: float) -> Refused | Ticket | None:
        """Queue a request; `release` says when it may go. Refused when it is not queued, another ticket (now `over`)
        when that one had to make room, else None."""
        refused = self.refusal(ticket, capacity, now)
        if refused is not None:
            return refused
        displaced = self._victim(ticket) if self.num_requests >= self._max_requests else None
        if displaced is not None:
            self.leave(displaced)
        key = (ticket.tier, ticket.tenant)
        if key not in self._queues:
            self.counters.join(ticket.tenant, [tenant for _, tenant in self._queues])
            self._queues[key] = _Queue([])
        ticket.state, ticket.queued_at, ticket.cost = "queued", now, self._cost(ticket)
        queue = self._queues[key]
        insort(queue.tickets, ticket, key=_order)
        queue.count(ticket, 1)
        return displaced

    def refusal(self, ticket: Ticket, capacity: Capacity, now: float) -> Refused | None:
        """Why `ticket` would not be queued now. A smaller one may be, a larger one may not."""
        refused = None
        if self._queues or not self._fits(ticket, capacity):
            refused = self._prospects(ticket, capacity, now)
        if refused is None and self.num_requests >= self._max_requests and self._victim(ticket) is None:
            return Refused("full", None)
        return refused

    def _prospects(self, ticket: Ticket, capacity: Capacity, now: float) -> Refused | None:
        """Why it is not worth while for `ticket` to wait."""
        queue = self._queues.get((ticket.tier, ticket.tenant))
        if queue is not None and len(queue.tickets) >= self._max_queued_per_tenant:
            return Refused("full", self._wait_s(ticket, capacity))
        likely_s = now - ticket.arrived_at + self._wait_s(ticket, capacity) + self.first_token.likely_s
        if ticket.deadline_at is not None and ticket.arrived_at + likely_s > ticket.deadline_at:
            return Refused("predicted_deadline", None)
        late_s = likely_s - self._ttft_target_s * ENTRY_SHARE
        return Refused("predicted_late", late_s) if late_s > 0 else None

    def release(self, capacity: Capacity, now: float) -> list[Ticket]:
        """Those that may go to the workers now, in order; they count as under way until they `leave`."""
        released = []
        while self._queues:
            tier = min(key[0] for key in self._queues)
            tenant = self.counters.next(name for queue_tier, name in self._queues if queue_tier == tier)
            queue = self._queues[(tier, tenant)]
            ticket = queue.tickets[0]
            if not self._fits(ticket, capacity):
                break
            self._take_out(ticket, queue)
            ticket.state, ticket.released_at = "released", now
            ticket.uncomputed_tokens, ticket.open_sequences = ticket.prompt_tokens, ticket.num_sequences
            self._released.add(ticket)
            self.num_sequences += ticket.num_sequences
            self.prompt_tokens += ticket.prompt_tokens
            ticket.awaited_tokens = self.prompt_tokens
            self.num_uncomputed += ticket.prompt_tokens > 0
            if now > ticket.queued_at:  # it waited
                self.throughput.released(ticket.num_sequences)
            self._serve(ticket, ticket.cost)
            released.append(ticket)
        return released

    def expire(self, now: float) -> list[tuple[Ticket, Loss]]:
        """Take out what nobody waits for any more, or what would be late if it went now."""
        lost: list[tuple[Ticket, Loss]] = []
        hopeless_s = self._ttft_target_s - min(self.first_token.likely_s, self._ttft_target_s / 2)
        for queue in list(self._queues.values()):
            for ticket in list(queue.tickets):
                if ticket.deadline_at is not None and now >= ticket.deadline_at:
                    lost.append((ticket, "deadline"))
                elif now - ticket.arrived_at > hopeless_s:
                    lost.append((ticket, "late"))
        for ticket, _ in lost:
            self.leave(ticket)
        return lost

    def prompt_done(self, ticket: Ticket, num_tokens: int, now: float) -> None:
        """A released request has the first token of a prompt, so that so many prompt tokens need no more computing."""
        if ticket.began_at is None:
            ticket.began_at = now
            self.first_token.observe(now - ticket.released_at)
            self.throughput.computed(ticket.awaited_tokens, now - ticket.released_at)
        self._computed(ticket, num_tokens)

    def over(self, ticket: Ticket, num_output_tokens: int) -> None:
        """One choice of a released request is over, after so many tokens."""
        ticket.open_sequences -= 1
        self.num_sequences -= 1
        mean = self._mean_output.setdefault(ticket.tenant, float(num_output_tokens))
        self._mean_output[ticket.tenant] = mean + (num_output_tokens - mean) / 8
        served = ticket.prompt_tokens / ticket.num_sequences + OUTPUT_WEIGHT * num_output_tokens
        self.service[ticket.tenant] = self.service.get(ticket.tenant, 0.0) + served
        expected = (ticket.cost - ticket.prompt_tokens) / ticket.num_sequences
        self._serve(ticket, OUTPUT_WEIGHT * num_output_tokens - expected)
        if ticket.open_sequences == 0:
            self._computed(ticket, ticket.uncomputed_tokens)

    def leave(self, ticket: Ticket) -> None:
        """A request is answered, or no longer wanted: it gives its place back. Leaving twice changes nothing."""
        if ticket.state == "queued":
            self._take_out(ticket, self._queues[(ticket.tier, ticket.tenant)])
        self._released.discard(ticket)
        ticket.state = "over"

    def look(self, capacity: Capacity, now: float) -> None:
        """Note the time that passed: who waited, and how fast sequences stream. A few times a second."""
        began, self._looked_at = self._looked_at, now
        if began is not None and self._queues:
            self.throughput.busy(now - began)
        self.fairness.look({tenant for _, tenant in self._queues}, now)
        self.sequence_limit.step(now, self.num_sequences, capacity.max_sequences)
        if len(self._mean_output) > self._max_requests * 2:
            self._mean_output.clear()

    def max_sequences(self, capacity: Capacity) -> int:
        """Sequences that may be under way from here."""
        left = capacity.left(capacity.max_sequences, capacity.others_sequences)
        return self.sequence_limit.within(max(1, left))

    def window_tokens(self, capacity: Capacity) -> int:
        """Prompt tokens that the workers may have before them."""
        rate = self.throughput.tokens_per_s
        num_workers = max(1, capacity.num_prefill_workers)
        wanted = (
            FIRST_WINDOW_TOKENS * num_workers if rate is None else rate * self._ttft_target_s * WINDOW_SHARE
        )
        window = min(max(wanted, MIN_WINDOW_TOKENS), MAX_WINDOW_TOKENS * num_workers)
        return capacity.left(int(window), capacity.others_prompt_tokens)

    def _computed(self, ticket: Ticket, num_tokens: int) -> None:
        done = min(num_tokens, ticket.uncomputed_tokens)
        ticket.uncomputed_tokens -= done
        self.prompt_tokens -= done
        self.num_uncomputed -= done > 0 and not ticket.uncomputed_tokens

    def _fits(self, ticket: Ticket, capacity: Capacity) -> bool:
        """Whether the workers can take it. One that is larger than everything goes when nothing else is under way, and
        a prompt of any size when there are fewer than prefill workers: none of them must idle."""
        sequences = self.num_sequences + ticket.num_sequences
        if self.num_sequences and sequences > self.max_sequences(capacity):
            return False
        if self.num_uncomputed < max(1, capacity.num_prefill_workers // (1 + capacity.num_rivals)):
            return True
        return self.prompt_tokens + ticket.prompt_tokens <= self.window_tokens(capacity)

    def _wait_s(self, ticket: Ticket, capacity: Capacity) -> float:
        """Seconds until `ticket` would be released if it were queued now.

        Whoever goes before it, by shares: its own tenant's requests of its priority; of every other tenant as much as
        that may be served before its counter reaches the one at which this request would go. Sequences for which there
        is room wait for no other to end.
        """
        own = self._queues.get((ticket.tier, ticket.tenant))
        ahead = [t for t in own.tickets if t.priority <= ticket.priority] if own is not None else []
        tokens = ticket.prompt_tokens + sum(t.prompt_tokens for t in ahead)
        sequences = ticket.num_sequences + sum(t.num_sequences for t in ahead)
        counter = self._counter_if_joined(ticket) + sum(t.cost / t.weight for t in ahead)
        share_tokens = share_sequences = 0.0
        for (tier, tenant), queue in self._queues.items():
            if tier > ticket.tier or (tier, tenant) == (ticket.tier, ticket.tenant):
                continue
            room = counter - self.counters[tenant]
            share = 1.0 if tier < ticket.tier else min(1.0, max(0.0, room) / max(1.0, queue.virtual_tokens))
            share_tokens += share * queue.prompt_tokens
            share_sequences += share * queue.sequences
        free = max(0, self.max_sequences(capacity) - self.num_sequences)
        return self.throughput.wait_s(tokens + share_tokens, max(0.0, sequences + share_sequences - free))

    def _counter_if_joined(self, ticket: Ticket) -> float:
        present = [self.counters[tenant] for _, tenant in self._queues]
        return max(self.counters[ticket.tenant], min(present, default=0.0))

    def _victim(self, ticket: Ticket) -> Ticket | None:
        """Whose room `ticket` may have: of the tenant that has the most waiting, if that has more than its own."""
        counts = self.queued_by_tenant()
        longest = max(counts, key=lambda tenant: (counts[tenant], tenant), default=None)
        if longest is None or counts[longest] <= counts.get(ticket.tenant, 0) + 1:
            return None
        tickets = [t for (_, name), queue in self._queues.items() if name == longest for t in queue.tickets]
        return max(tickets, key=lambda t: (t.tier, t.priority, t.queued_at))

    def _take_out(self, ticket: Ticket, queue: _Queue) -> None:
        queue.tickets.remove(ticket)
        queue.count(ticket, -1)
        if not queue.tickets:
            del self._queues[(ticket.tier, ticket.tenant)]

    def _cost(self, ticket: Ticket) -> float:
        """Virtual tokens that a request is expected to take."""
        usual = self._mean_output.get(ticket.tenant)
        output = (
            ticket.output_tokens if usual is None else min(ticket.output_tokens, usual * ticket.num_sequences)
        )
        return ticket.prompt_tokens + OUTPUT_WEIGHT * output

    def _serve(self, ticket: Ticket, virtual_tokens: float) -> None:
        self.counters.charge(ticket.tenant, virtual_tokens, ticket.weight)
        self.fairness.served(ticket.tenant, virtual_tokens, ticket.weight)
