"""A request's leave to use tokens: reserved before it begins, settled when it is over.

While Redis is away nobody who has limits is let in: they hold, or they mean nothing. Callers without limits are served.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.errors import GatewayError, QuotaError, RateLimitError, UnavailableError
from app.tenancy.ledger import Ledger, day_of
from app.tenancy.limits import Limit, LimitedCharge, charges
from app.tenancy.prices import Price, from_nano
from app.tenancy.principal import Call, Principal
from memory_pool.reservations import AsyncReservations, Refused, Reservation, WindowUse
from memory_pool.store import StoreError

log = logging.getLogger(__name__)

SETTLE_RETRIES_S = 30.0
"""How long a settlement is tried again while Redis is away; what was reserved lapses by itself after that."""


@dataclass(eq=False)
class Leave:
    """What one request may use. `limited` and `reservation` are empty for callers without limits."""

    principal: Principal
    price: Price
    limited: list[LimitedCharge]
    reservation: Reservation | None


@dataclass(frozen=True)
class Standing:
    """A limit and what is used of it: in the last minute, and of the month's budget. None: it does not limit that."""

    limit: Limit
    requests: int | None
    tokens: int | None
    spent_nano: int | None


class Quota:
    """Reserves, holds and settles for one gateway."""

    def __init__(
        self, reservations: AsyncReservations, ledger: Ledger, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._reservations = reservations
        self._ledger = ledger
        self._clock = clock
        self._held: dict[str, Reservation] = {}
        self._settlements: list[tuple[Reservation, list[int]]] = []
        self._wake = asyncio.Event()

    @property
    def num_held(self) -> int:
        """Reservations under way or not settled yet."""
        return len(self._held) + len(self._settlements)

    async def reserve(
        self, call: Call, request_id: str, model: str, price: Price, *, prompt_tokens: int, output_tokens: int
    ) -> Leave:
        """Leave for a request of at most so many tokens. The call's answer gets `x-ratelimit-…` headers.

        Raises RateLimitError, QuotaError when waiting does not help, UnavailableError when Redis is away.
        """
        principal = call.principal
        limited = charges(
            principal.limits,
            principal.tenant_id,
            model,
            num_tokens=prompt_tokens + output_tokens,
            cost_nano=price.most_nano(prompt_tokens, output_tokens),
            month=day_of(self._clock())[:7],
        )
        if not limited:
            return Leave(principal, price, [], None)
        try:
            answer = await self._reserve(request_id, limited)
        except StoreError as error:
            log.warning("limits cannot be checked: %s", error)
            raise UnavailableError(
                "limits cannot be checked now; try again shortly",
                code="limits_unavailable",
                retry_after_s=1.0,
            ) from error
        call.headers += _rate_headers(limited, answer.windows)
        if isinstance(answer, Refused):
            raise _refusal(limited[answer.index], answer)
        self._held[request_id] = answer
        return Leave(principal, price, limited, answer)

    async def standing(self, principal: Principal) -> list[Standing]:
        """What is used of each of the caller's limits now; charges nothing.

        Raises UnavailableError when Redis is away.
        """
        month = day_of(self._clock())[:7]
        found = []
        for limit in principal.limits:
            # More than there is of anything never fits: the answer says how full the windows are, and nothing is kept.
            asked = charges([limit], principal.tenant_id, limit.model, num_tokens=0, cost_nano=0, month=month)
            windows = [item for item in asked if item.charge.counter == "window"]
            too_much = [replace(item.charge, amount=item.charge.limit + 1) for item in windows]
            used: dict[str, int] = {}
            if too_much:
                try:
                    answer = await self._reservations.reserve("standing", too_much)
                except StoreError as error:
                    raise UnavailableError(
                        "limits cannot be read now; try again shortly",
                        code="limits_unavailable",
                        retry_after_s=1.0,
                    ) from error
                used = {item.measure: use.used for item, use in zip(windows, answer.windows, strict=True)}
            spent = None
            if limit.monthly_budget_nano is not None:
                spent = await self._ledger.spent_nano(limit, month)
            requests, tokens = used.get("requests per minute"), used.get("tokens per minute")
            found.append(Standing(limit, requests, tokens, spent))
        return found

    def settle(self, leave: Leave, *, num_tokens: int, cost_nano: int) -> None:
        """What the request used; the rest of what it reserved is free again. Returns at once."""
        self._settle(leave, {"tokens per minute": num_tokens, "monthly budget": cost_nano}, counts=True)

    def cancel(self, leave: Leave) -> None:
        """The request never began: not even its number counts."""
        self._settle(leave, {}, counts=False)

    async def run(self) -> None:
        """Settle what is over and hold what is under way, until cancelled."""
        pause_s = self._reservations.lease_s / 3
        held_at = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with what it waits for.
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            self._wake.clear()
            await self.flush()
            if time.monotonic() - held_at >= pause_s:
                held_at = time.monotonic()
                await self._hold()

    async def flush(self) -> None:
        """Settle everything that is over; what Redis does not take is tried again for a while."""
        give_up_at = time.monotonic() + SETTLE_RETRIES_S
        while self._settlements:
            batch = self._settlements[:500]
            try:
                await self._reservations.settle(batch)
            except StoreError as error:
                if time.monotonic() >= give_up_at:
                    log.warning("%d reservations are left to lapse: %s", len(self._settlements), error)
                    self._settlements.clear()
                    return
                await asyncio.sleep(0.5)
                continue
            del self._settlements[: len(batch)]

    async def _hold(self) -> None:
        try:
            await self._reservations.hold(list(self._held.values()))
        except StoreError as error:
            log.warning("reservations cannot be held: %s", error)

    async def _reserve(self, request_id: str, limited: list[LimitedCharge]) -> Reservation | Refused:
        while True:
            answer = await self._reservations.reserve(request_id, [item.charge for item in limited])
            if not isinstance(answer, Refused) or not answer.unseeded:
                return answer
            item = limited[answer.index]
            month = item.charge.key.rpartition(":")[2]
            await self._reservations.seed(item.charge.key, await self._ledger.spent_nano(item.limit, month))

    def _settle(self, leave: Leave, used: dict[str, int], *, counts: bool) -> None:
        reservation = leave.reservation
        if reservation is None or self._held.pop(reservation.id, None) is None:
            return
        amounts = [
            int(counts) if item.measure == "requests per minute" else used.get(item.measure, 0)
            for item in leave.limited
        ]
        self._settlements.append((reservation, amounts))
        self._wake.set()


def _refusal(item: LimitedCharge, answer: Refused) -> GatewayError:
    charge, limit = item.charge, item.limit
    if item.measure == "monthly budget":
        return QuotaError(
            f"the monthly budget of this {limit.name}, {from_nano(charge.limit):f}, does not cover this request",
            code="insufficient_quota",
        )
    if answer.retry_after_s is None:
        what = f"{charge.amount} (prompt and max_tokens)" if item.measure == "tokens per minute" else "1"
        return QuotaError(
            f"this request needs {what} of {charge.limit} {item.measure} that this {limit.name} has: "
            "it can never fit",
            code="request_exceeds_limit",
        )
    return RateLimitError(
        f"limit of this {limit.name}: {charge.limit} {item.measure}", retry_after_s=answer.retry_after_s
    )


def _rate_headers(limited: list[LimitedCharge], windows: tuple[WindowUse, ...]) -> list[tuple[bytes, bytes]]:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` of the limits nearest to their end."""
    headers: list[tuple[bytes, bytes]] = []
    in_windows = [item for item in limited if item.charge.counter == "window"]
    for what, measure in (("requests", "requests per minute"), ("tokens", "tokens per minute")):
        uses = [
            (item.charge.limit - use.used, item.charge.limit, use.empty_in_s)
            for item, use in zip(in_windows, windows, strict=True)
            if item.measure == measure
        ]
        if uses:
            remaining, limit, empty_in_s = min(uses)
            for name, value in (
                ("limit", str(limit)),
                ("remaining", str(max(0, remaining))),
                ("reset", f"{empty_in_s:.3f}s"),
            ):
                headers.append((f"x-ratelimit-{name}-{what}".encode(), value.encode()))
    return headers
