"""Counters that many processes charge at once and that none can overrun: reserve, settle, in one atomic step each.

    reserve (all charges of a request, or none) -> hold … hold -> settle (what was really used; the rest is given back)

Three kinds of counter, each under one Redis key:

    window   a hash of slot -> amount. A slot is a 60th of the window. A charge counts from its reservation until a
             whole window after its slot has ended, so no window of that length, wherever it begins, holds more.
    leases   a sorted set of reservation -> instant at which it lapses. Holding renews it; a dead process's lapse.
    budget   a hash of `spent`, and of what is held by reservations under way, each with the instant it lapses.

Instants are milliseconds on Redis's own clock. All counters of one reservation must share a hash tag.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from memory_pool.connection import AsyncConnection, Connection

Counter = Literal["window", "leases", "budget"]

WORDS = "cm:q:words"
"""A hash, as everything here: who may not GET cannot read a block's value either (`acl.py`)."""

SETTLED = ":settled:"
"""In the key that marks a reservation as settled."""
SLOTS = 60
_KEEP_MS = 6 * 3600 * 1000
"""How long a budget's counter lives after its last use; it is then seeded again from the books."""
_SETTLED_MS = 3600 * 1000
"""How long a settled reservation is remembered, so that settling it again does nothing."""

_PRELUDE = """
local now = tonumber(ARGV[1])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local window, lease, id = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local slot_ms = window / 60
local slot = math.floor(now / slot_ms)
local function slots_of(key)
  local flat, found, used = redis.call('HGETALL', key), {}, 0
  for i = 1, #flat, 2 do
    local at, amount = tonumber(flat[i]), tonumber(flat[i + 1])
    if at < slot - 60 then redis.call('HDEL', key, flat[i])
    else found[#found + 1] = {at, amount}; used = used + amount end
  end
  table.sort(found, function(a, b) return a[1] < b[1] end)
  return found, used
end
local function held_in(key)
  local flat, held = redis.call('HGETALL', key), 0
  for i = 1, #flat, 2 do
    if flat[i] ~= 'spent' then
      local cost, lapses = string.match(flat[i + 1], '^(%d+) (%d+)$')
      if tonumber(lapses) <= now then redis.call('HDEL', key, flat[i]) else held = held + tonumber(cost) end
    end
  end
  return held
end
"""

# KEYS: the counters. ARGV: now (0: Redis's), window, lease, id; for each counter its kind, amount, limit.
# Answers: 1 and the slot, or 0 and the charge that did not fit; milliseconds until it can (-1: never, -2: the budget's
# counter is not seeded); then for each window its use (with this charge, if made) and milliseconds until all is free.
_RESERVE = (
    _PRELUDE
    + """
local report = {}
local refused, wait = 0, 0
for i, key in ipairs(KEYS) do
  local kind, amount, limit = ARGV[3 * i + 2], tonumber(ARGV[3 * i + 3]), tonumber(ARGV[3 * i + 4])
  local fits, until_fits = true, -1
  if kind == 'window' then
    local slots, used = slots_of(key)
    fits = used + amount <= limit
    if not fits and amount <= limit then
      local over = used + amount - limit
      for _, row in ipairs(slots) do
        over = over - row[2]
        if over <= 0 then until_fits = (row[1] + 61) * slot_ms - now; break end
      end
    end
    local newest = slots[#slots]
    report[#report + 1] = used
    report[#report + 1] = newest and math.ceil((newest[1] + 61) * slot_ms - now) or 0
  elseif kind == 'leases' then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    fits = redis.call('ZCARD', key) < limit
    if limit > 0 then until_fits = 1000 end
  else
    local spent = redis.call('HGET', key, 'spent')
    if not spent then
      fits, until_fits = false, -2
    else
      fits = tonumber(spent) + held_in(key) + amount <= limit and tonumber(spent) < limit
    end
  end
  if not fits and refused == 0 then refused, wait = i, math.ceil(until_fits) end
end
if refused > 0 then return {0, refused, wait, unpack(report)} end
local place = 1
for i, key in ipairs(KEYS) do
  local kind, amount = ARGV[3 * i + 2], ARGV[3 * i + 3]
  if kind == 'window' then
    redis.call('HINCRBY', key, string.format('%.0f', slot), amount)
    redis.call('PEXPIRE', key, math.ceil(window + 2 * slot_ms))
    report[place] = report[place] + amount
    report[place + 1] = math.ceil(61 * slot_ms)
    place = place + 2
  elseif kind == 'leases' then
    redis.call('ZADD', key, now + lease, id)
    redis.call('PEXPIRE', key, 10 * lease)
  else
    redis.call('HSET', key, 'h:' .. id, string.format('%.0f %.0f', amount, now + lease))
    redis.call('PEXPIRE', key, 'KEEP_MS')
  end
end
return {1, slot, 0, unpack(report)}
"""
).replace("'KEEP_MS'", str(_KEEP_MS))

# KEYS: the mark of a settled reservation, the counters. ARGV: as above; the slot; for each counter its kind, what was
# reserved, what was used. Answers whether this was the first time.
_SETTLE = (
    _PRELUDE
    + """
if redis.call('HSETNX', KEYS[1], 'settled', 1) == 0 then return 0 end
redis.call('PEXPIRE', KEYS[1], SETTLED_MS)
for i = 2, #KEYS do
  local key, kind = KEYS[i], ARGV[3 * i]
  local reserved, used = tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  if kind == 'window' then
    local at = ARGV[5]
    if used ~= reserved and redis.call('HEXISTS', key, at) == 1 then
      if redis.call('HINCRBY', key, at, string.format('%.0f', used - reserved)) <= 0 then
        redis.call('HDEL', key, at)
      end
    end
  elseif kind == 'leases' then
    redis.call('ZREM', key, id)
  else
    redis.call('HDEL', key, 'h:' .. id)
    if redis.call('HEXISTS', key, 'spent') == 1 then
      redis.call('HINCRBY', key, 'spent', string.format('%.0f', used))
    end
  end
end
return 1
"""
).replace("SETTLED_MS", str(_SETTLED_MS))

# KEYS: the counters. ARGV: as above; for each counter its kind and amount. A window needs no holding.
_HOLD = (
    _PRELUDE
    + """
for i, key in ipairs(KEYS) do
  local kind = ARGV[2 * i + 3]
  if kind == 'leases' then
    redis.call('ZADD', key, now + lease, id)
    redis.call('PEXPIRE', key, 10 * lease)
  elseif kind == 'budget' then
    redis.call('HSET', key, 'h:' .. id, string.format('%.0f %.0f', ARGV[2 * i + 4], now + lease))
  end
end
return 1
"""
)


@dataclass(frozen=True)
class Charge:
    """An amount to be charged to a counter whose sum must not exceed `limit`."""

    key: str
    counter: Counter
    amount: int
    limit: int


@dataclass(frozen=True)
class WindowUse:
    """How full a window is: `used` of its limit, and seconds until it is empty again."""

    used: int
    empty_in_s: float


@dataclass(frozen=True)
class Refused:
    """The charge at `index` does not fit. `retry_after_s` None: never will; `unseeded`: its budget has no sum yet."""

    index: int
    retry_after_s: float | None
    unseeded: bool
    windows: tuple[WindowUse, ...]


@dataclass(frozen=True)
class Reservation:
    """Charges made, to be held and settled under `id`."""

    id: str
    charges: tuple[Charge, ...]
    slot: int
    windows: tuple[WindowUse, ...]
    """One for each window among the charges, in their order."""


@dataclass(frozen=True, kw_only=True)
class Outstanding:
    """What the counters of one Redis hold, all together."""

    leases: int
    """Requests that count as under way."""
    budget_holds: int
    """Costs reserved and not settled."""
    windows: dict[str, int]
    """Amounts in each window, slots that have passed but were not looked at since included."""
    spent: dict[str, int]
    """What each budget's counter says was spent."""


def outstanding(connection: Connection, prefix: str) -> Outstanding:
    """The counters whose keys begin with `prefix`, for an audit. Raises StoreError when Redis cannot be reached."""
    leases, holds, windows, spent = 0, 0, dict[str, int](), dict[str, int]()
    for key in connection.scan(f"{prefix}*"):
        # Words, and the marks of settled reservations, are hashes, too, but count nothing.
        if key.decode() == WORDS or SETTLED in key.decode():
            continue
        kind = connection.call("TYPE", key)
        if kind == b"zset":
            leases += connection.call("ZCARD", key)
        elif kind == b"hash":
            names: list[bytes] = connection.call("HKEYS", key)
            amounts: list[bytes] = connection.call("HVALS", key)
            fields = dict(zip(names, amounts, strict=True))
            reserved = [name for name in names if name.startswith(b"h:")]
            holds += len(reserved)
            if reserved or b"spent" in fields:
                spent[key.decode()] = int(fields.get(b"spent", 0))
            else:
                windows[key.decode()] = sum(map(int, fields.values()))
    return Outstanding(leases=leases, budget_holds=holds, windows=windows, spent=spent)


class AsyncReservations:
    """The counters in the Redis at `url`. `clock` (milliseconds) replaces Redis's own in tests."""

    def __init__(
        self,
        url: str,
        *,
        window_s: float = 60.0,
        lease_s: float = 30.0,
        timeout_s: float = 2.0,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._connection = AsyncConnection(url, timeout_s=timeout_s)
        self.lease_s = lease_s
        self._window_ms = round(window_s * 1000)
        self._lease_ms = round(lease_s * 1000)
        self._clock = clock or (lambda: 0)

    async def reserve(self, reservation_id: str, charges: Sequence[Charge]) -> Reservation | Refused:
        """Make all charges or none, in one step. Raises StoreError when Redis cannot be reached."""
        words: list[str | int] = [*self._header(reservation_id)]
        for charge in charges:
            words += [charge.counter, charge.amount, charge.limit]
        done, place, wait_ms, *uses = await self._connection.run(
            _RESERVE, [charge.key for charge in charges], words
        )
        windows = tuple(
            WindowUse(int(used), empty_ms / 1000)
            for used, empty_ms in zip(uses[::2], uses[1::2], strict=True)
        )
        if done:
            return Reservation(reservation_id, tuple(charges), int(place), windows)
        return Refused(int(place) - 1, wait_ms / 1000 if wait_ms >= 0 else None, wait_ms == -2, windows)

    async def settle(self, settlements: Sequence[tuple[Reservation, Sequence[int]]]) -> None:
        """Put what was really used, one amount a charge, in the place of what was reserved; the rest is free again.

        Settling again does nothing. Raises StoreError when Redis cannot be reached.
        """
        commands = []
        for reservation, used in settlements:
            tag = reservation.charges[0].key.partition("{")[2].partition("}")[0]
            words: list[str | int] = [*self._header(reservation.id), reservation.slot]
            for charge, amount in zip(reservation.charges, used, strict=True):
                words += [charge.counter, charge.amount, amount]
            keys = [
                f"cm:q:{{{tag}}}{SETTLED}{reservation.id}",
                *(charge.key for charge in reservation.charges),
            ]
            commands.append(("EVAL", _SETTLE, len(keys), *keys, *words))
        await self._connection.call_many(commands)

    async def hold(self, reservations: Sequence[Reservation]) -> None:
        """Renew the leases of reservations under way. Raises StoreError when Redis cannot be reached."""
        commands = []
        for reservation in reservations:
            charges = [charge for charge in reservation.charges if charge.counter != "window"]
            if charges:
                words = [*self._header(reservation.id)]
                for charge in charges:
                    words += [charge.counter, charge.amount]
                commands.append(("EVAL", _HOLD, len(charges), *(charge.key for charge in charges), *words))
        await self._connection.call_many(commands)

    async def seed(self, key: str, spent: int) -> None:
        """What a budget's counter starts from, unless somebody else was first."""
        await self._connection.call("HSETNX", key, "spent", spent)
        await self._connection.call("PEXPIRE", key, _KEEP_MS)

    async def word(self, name: str) -> bytes | None:
        """A small value that processes leave for each other. Raises StoreError."""
        value: bytes | None = await self._connection.call("HGET", WORDS, name)
        return value

    async def leave_word(self, name: str, value: str) -> None:
        """Set what `word` reads. Raises StoreError."""
        await self._connection.call("HSET", WORDS, name, value)

    async def close(self) -> None:
        """Idempotent."""
        await self._connection.close()

    def _header(self, reservation_id: str) -> list[str | int]:
        return [self._clock(), self._window_ms, self._lease_ms, reservation_id]
