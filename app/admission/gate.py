"""The gate between the API and the dispatcher: asks `Admission` and does what it says, on one event loop.

A request enters with two calls: `go`, once it may be sent to the workers, and `lose`, with the error to answer, when it
is dropped from the queue. One of them is called at most once, `go` perhaps before `enter` returns.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from app.admission.admission import Admission, Capacity, Refused
from app.admission.ticket import Loss, Ticket
from app.errors import DeadlineError, GatewayError, OverloadedError, UnavailableError

TICK_S = 0.05
MAX_RETRY_AFTER_S = 60.0
"""Half of what the OpenAI SDK obeys at most."""

Rejection = Literal["full", "predicted_late", "predicted_deadline", "deadline", "late", "displaced"]


@dataclass(frozen=True, slots=True)
class _Calls:
    go: Callable[[], None]
    lose: Callable[[GatewayError], None]


class Gate:
    """Admission in front of workers whose `capacity` is asked for anew each time; `on_reject` counts."""

    def __init__(
        self,
        admission: Admission,
        *,
        capacity: Callable[[], Capacity],
        clock: Callable[[], float],
        retry_after_s: float,
        on_reject: Callable[[Rejection], None] = lambda _: None,
    ) -> None:
        self.admission = admission
        self._capacity = capacity
        self._clock = clock
        self._retry_after_s = retry_after_s
        self._calls: dict[Ticket, _Calls] = {}
        self.on_reject = on_reject

    def check(self, ticket: Ticket) -> None:
        """Raise at once what `enter` would raise: before work is put into a request that has no prospects."""
        refused = self.admission.refusal(ticket, self._capacity(), self._clock())
        if refused is not None:
            raise self._refuse(refused)

    def enter(self, ticket: Ticket, go: Callable[[], None], lose: Callable[[GatewayError], None]) -> None:
        """Queue a request. Raises OverloadedError (429), or DeadlineError (504) when it would wait for nothing."""
        now = self._clock()
        answer = self.admission.offer(ticket, self._capacity(), now)
        if isinstance(answer, Refused):
            raise self._refuse(answer)
        self._calls[ticket] = _Calls(go, lose)
        if answer is not None:
            self._lose(answer, "displaced")
        self._pump(now)

    def prompt_done(self, ticket: Ticket, num_tokens: int) -> None:
        """The first token of one of its prompts came: the workers need not compute so many tokens any more."""
        if ticket.state == "released":
            now = self._clock()
            self.admission.prompt_done(ticket, num_tokens, now)
            self._pump(now)

    def streamed(self, gap_s: float, num_tokens: int) -> None:
        """So many tokens of a sequence came so long after those before them."""
        self.admission.sequence_limit.observe(gap_s, num_tokens)

    def choice_over(self, ticket: Ticket, num_output_tokens: int) -> None:
        """The workers are done with one of its choices, or nobody wants more of it."""
        if ticket.state == "released":
            self.admission.over(ticket, num_output_tokens)
            self._pump(self._clock())

    def leave(self, ticket: Ticket) -> None:
        """The request is answered or given up."""
        self._calls.pop(ticket, None)
        self.admission.leave(ticket)
        self._pump(self._clock())

    def changed(self) -> None:
        """The workers can take more or less than before."""
        self._pump(self._clock())

    def _pump(self, now: float) -> None:
        if not self.admission.has_queued:
            return
        for ticket in self.admission.release(self._capacity(), now):
            self._calls.pop(ticket).go()

    async def run(self) -> None:
        """Drop what is late and learn from the time that passes, until cancelled."""
        while True:
            self.turn()
            await asyncio.sleep(TICK_S)

    def turn(self) -> None:
        """One look at the clock."""
        now = self._clock()
        self.admission.look(self._capacity(), now)
        for ticket, loss in self.admission.expire(now):
            self._lose(ticket, loss)
        self._pump(now)

    def _lose(self, ticket: Ticket, loss: Loss) -> None:
        self.on_reject(loss)
        self._calls.pop(ticket).lose(self._describe(loss))

    def _describe(self, loss: Loss) -> GatewayError:
        if loss == "deadline":
            return DeadlineError("the caller's own time limit passed before a worker was free")
        if loss == "late":
            return UnavailableError(
                "the service is overloaded: no worker got to this request in time; try again shortly",
                code="overloaded",
                retry_after_s=self._retry_after_s,
            )
        return OverloadedError(
            "too many requests of yours wait already; try again shortly", retry_after_s=self._retry_after_s
        )

    def _refuse(self, refused: Refused) -> GatewayError:
        self.on_reject(refused.reason)
        wait_s = self._retry_after_s if refused.retry_after_s is None else refused.retry_after_s
        retry_after_s = min(max(wait_s, self._retry_after_s), MAX_RETRY_AFTER_S)
        if refused.reason == "predicted_deadline":
            return DeadlineError("so much waits that the caller's own time limit would pass first")
        if refused.reason == "full":
            return OverloadedError(
                "as many requests as may be are waiting; try again shortly", retry_after_s=retry_after_s
            )
        return OverloadedError(
            "so much waits that a first token would come too late; try again later",
            retry_after_s=retry_after_s,
        )
