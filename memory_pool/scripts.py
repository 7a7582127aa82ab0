"""The Lua scripts of the pool: every decision that must be one atomic step inside Redis.

All keys of a script share one hash tag, so each runs on Redis Cluster as well. Instants are milliseconds on Redis's
own clock. A charge is `size writers stored deadline`: bytes charged, writers under way, whether a writer has stored
the block, and the instant after which writers under way are taken for dead.
"""

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# A full Redis refuses a script's first write if that needs memory, but not the ones after it. What keeps the books
# true and the members known must pass: it begins with a removal of nothing.
_ANYWAY = """
redis.call('HDEL', KEYS[1], '')
"""

# The instant of last use, in microseconds. Of keys given together the first counts as used last: a chain is evicted
# from its end, because blocks behind a lost one are of no use.
_USED_NOW = """
local function used_now(i)
  return string.format('%.0f', time[1] * 1000000 + time[2] + #ARGV - i)
end
"""

_CHARGES = """
local function charge_of(key)
  local charge = redis.call('HGET', KEYS[1], key)
  if not charge then return nil end
  local size, writers, stored, deadline = string.match(charge, '^(%d+) (%d+) (%d) (%d+)$')
  return tonumber(size), tonumber(writers), tonumber(stored), tonumber(deadline)
end
local function set_charge(key, size, writers, stored, deadline)
  redis.call('HSET', KEYS[1], key, string.format('%.0f %.0f %.0f %.0f', size, writers, stored, deadline))
end
local used = tonumber(redis.call('HGET', KEYS[2], 'used_bytes') or '0')
local function set_used() redis.call('HSET', KEYS[2], 'used_bytes', string.format('%.0f', used)) end
"""

COUNT_PREFIX = """
for i, key in ipairs(KEYS) do
  if redis.call('EXISTS', key) == 0 then return i - 1 end
end
return #KEYS
"""

# KEYS: charges, account. ARGV: milliseconds a writer may take, 1 to charge also what is believed stored; key, size ...
# Answers: whether the namespace was known; for each key 0 (over quota), 1 (charged), 2 (believed stored).
ADMIT = (
    _NOW
    + _CHARGES
    + """
local quota = tonumber(redis.call('HGET', KEYS[2], 'quota_bytes') or '') or math.huge
local answers = {redis.call('HEXISTS', KEYS[2], 'used_bytes')}
for i = 3, #ARGV, 2 do
  local size, old, writers, stored = tonumber(ARGV[i + 1]), charge_of(ARGV[i])
  old, writers, stored = old or 0, writers or 0, stored or 0
  if stored == 1 and ARGV[2] == '0' then
    answers[#answers + 1] = 2
  elseif used - old + size > quota then
    answers[#answers + 1] = 0
  else
    used = used - old + size
    set_charge(ARGV[i], size, writers + 1, 0, now + ARGV[1])
    answers[#answers + 1] = 1
  end
end
set_used()
return answers
"""
)

# KEYS: charges, account, fresh, used.
# ARGV: number of counts n, n times (name, more), then key, 1 (stored) or 0 (failed) ...
# Answers 0 for each key whose charge is gone: its writer was taken for dead.
SETTLE = (
    _ANYWAY
    + _NOW
    + _USED_NOW
    + _CHARGES
    + """
local answers = {}
local first = 2 + 2 * ARGV[1]
for i = first, #ARGV, 2 do
  local size, writers, stored, deadline = charge_of(ARGV[i])
  if not size then
    answers[#answers + 1] = 0
  else
    writers = math.max(0, writers - 1)
    if ARGV[i + 1] == '1' then
      stored = 1
      redis.call('RPUSH', KEYS[3], ARGV[i])
      redis.call('ZADD', KEYS[4], used_now(i), ARGV[i])
    end
    if writers == 0 and stored == 0 then
      redis.call('HDEL', KEYS[1], ARGV[i])
      used = used - size
    else
      set_charge(ARGV[i], size, writers, stored, deadline)
    end
    answers[#answers + 1] = 1
  end
end
if #ARGV >= first then
  set_used()
  local too_many = redis.call('LLEN', KEYS[3]) - 10000
  if too_many > 0 then
    redis.call('LTRIM', KEYS[3], too_many, -1)
    redis.call('HINCRBY', KEYS[2], 'lost', too_many)
  end
end
for i = 2, first - 1, 2 do redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[i + 1]) end
return answers
"""
)

# KEYS: account, used. ARGV: number of counts n, n times (name, more), then keys of blocks that were read ...
NOTE_FETCH = (
    _ANYWAY
    + _NOW
    + _USED_NOW
    + """
local first = 2 + 2 * ARGV[1]
for i = 2, first - 1, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
for i = first, #ARGV do redis.call('ZADD', KEYS[2], 'XX', used_now(i), ARGV[i]) end
return 0
"""
)

# KEYS: charges, account, gone, used.
# ARGV: reason, most names remembered; then key, the charge as it was read or '' for any ...
# Refunds blocks that are no more and remembers why. Answers 1 for each one refunded.
FORGET = (
    _ANYWAY
    + _NOW
    + _CHARGES
    + """
local answers = {}
for i = 3, #ARGV, 2 do
  local size, writers = charge_of(ARGV[i])
  local same = ARGV[i + 1] == '' and writers == 0 or redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1]
  if size and same then
    redis.call('HDEL', KEYS[1], ARGV[i])
    used = used - size
    redis.call('ZREM', KEYS[4], ARGV[i])
    redis.call('ZADD', KEYS[3], now, ARGV[1] .. ' ' .. ARGV[i])
    redis.call('HINCRBY', KEYS[2], 'gone_' .. ARGV[1], 1)
    answers[#answers + 1] = 1
  else
    answers[#answers + 1] = 0
  end
end
set_used()
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - ARGV[2])
return answers
"""
)

# KEYS: charges, account, gone. ARGV: blocks asked for, blocks found, key of the first one missing or ''.
# Counts a lookup; answers why the first missing block missed, or ''.
NOTE_LOOKUP = (
    _ANYWAY
    + """
redis.call('HINCRBY', KEYS[2], 'queries', ARGV[1])
redis.call('HINCRBY', KEYS[2], 'hits', ARGV[2])
if ARGV[3] == '' then return '' end
local reason = 'never_seen'
if redis.call('HEXISTS', KEYS[1], ARGV[3]) == 1 then
  reason = 'evicted'
else
  for _, known in ipairs({'evicted', 'damaged'}) do
    if redis.call('ZSCORE', KEYS[3], known .. ' ' .. ARGV[3]) then reason = known end
  end
end
redis.call('HINCRBY', KEYS[2], 'miss_' .. reason, 1)
return reason
"""
)

# KEYS: charges, used. ARGV: most keys. Answers key, instant of last use, charge ... least recently used first.
OLDEST = """
local answers = {}
local oldest = redis.call('ZRANGE', KEYS[2], 0, ARGV[1] - 1, 'WITHSCORES')
for i = 1, #oldest, 2 do
  local charge = redis.call('HGET', KEYS[1], oldest[i])
  if charge then
    for _, word in ipairs({oldest[i], oldest[i + 1], charge}) do answers[#answers + 1] = word end
  else
    redis.call('ZREM', KEYS[2], oldest[i])
  end
end
return answers
"""

# KEYS: a list. ARGV: most keys. Takes keys from its head.
TAKE = """
local taken = redis.call('LRANGE', KEYS[1], 0, ARGV[1] - 1)
redis.call('LTRIM', KEYS[1], #taken, -1)
return taken
"""

# KEYS: charges, account. Answers the account less the sum of its charges.
IMBALANCE = (
    _CHARGES
    + """
local sum = 0
for _, charge in ipairs(redis.call('HVALS', KEYS[1])) do sum = sum + tonumber(string.match(charge, '^%d+')) end
return string.format('%.0f', used - sum)
"""
)

NOW_MS = _NOW + "return now"

PIN_PREFIX = "pin "
"""With this begin the holders whose leases yield when nothing else is left to evict."""

_LEASES = (
    _NOW
    + f"""
local function leased(block, but_pins)
  local held = redis.call('HGETALL', KEYS[1])
  local pin = block .. ' {PIN_PREFIX}'
  for i = 1, #held, 2 do
    if string.sub(held[i], 1, #block) == block and tonumber(held[i + 1]) > now
        and not (but_pins and string.sub(held[i], 1, #pin) == pin) then
      return true
    end
  end
  return false
end
"""
)

# KEYS: for each block the leases of its tag, and the block. ARGV: holder, milliseconds. A leased block has no TTL, so
# that Redis's own eviction (volatile-lru) passes it over. Answers how many leading blocks are there and leased.
LEASE = (
    _ANYWAY
    + _NOW
    + """
for i = 2, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 0 then return i / 2 - 1 end
  redis.call('HSET', KEYS[i - 1], KEYS[i] .. ' ' .. ARGV[1], string.format('%.0f', now + ARGV[2]))
  redis.call('PERSIST', KEYS[i])
end
return #KEYS / 2
"""
)

# KEYS: leases of the tag, blocks of the tag. ARGV: holder, TTL in milliseconds of a block that nobody holds any more.
RELEASE = (
    _LEASES
    + """
for i = 2, #KEYS do
  if redis.call('HDEL', KEYS[1], KEYS[i] .. ' ' .. ARGV[1]) == 1 and not leased(KEYS[i], false) then
    redis.call('PEXPIRE', KEYS[i], ARGV[2])
  end
end
return 0
"""
)

# KEYS: leases of the tag, blocks of the tag. ARGV: 1 to count pins as nobody. Removes blocks that nobody holds; answers
# 1 for each one removed.
EVICT = (
    _LEASES
    + """
local answers = {}
for i = 2, #KEYS do
  answers[i - 1] = 0
  if not leased(KEYS[i], ARGV[1] == '1') then answers[i - 1] = redis.call('UNLINK', KEYS[i]) end
end
return answers
"""
)

# KEYS: leases of the tag. Answers `block holder` for each lease that has not run out.
HELD = (
    _NOW
    + """
local found = {}
local held = redis.call('HGETALL', KEYS[1])
for i = 1, #held, 2 do
  if tonumber(held[i + 1]) > now then found[#found + 1] = held[i] end
end
return found
"""
)

# KEYS: leases of the tag. ARGV: TTL in milliseconds. Drops leases whose holder let them run out; answers how many.
SWEEP_LEASES = (
    _LEASES
    + """
local held = redis.call('HGETALL', KEYS[1])
local swept = 0
for i = 1, #held, 2 do
  if tonumber(held[i + 1]) <= now then
    redis.call('HDEL', KEYS[1], held[i])
    swept = swept + 1
    local block = string.match(held[i], '^(%S+) ')
    if not leased(block, false) then redis.call('PEXPIRE', block, ARGV[1]) end
  end
end
return swept
"""
)

# KEYS: the group's hash. ARGV: member, record, milliseconds.
ANNOUNCE = (
    _ANYWAY + _NOW + "redis.call('HSET', KEYS[1], ARGV[1], struct.pack('<d', now + ARGV[3]) .. ARGV[2])"
)

# KEYS: the group's hash. Answers member, record ... of those alive.
MEMBERS = (
    _NOW
    + """
local found = redis.call('HGETALL', KEYS[1])
local alive = {}
for i = 1, #found, 2 do
  if struct.unpack('<d', found[i + 1]) > now then
    alive[#alive + 1] = found[i]
    alive[#alive + 1] = string.sub(found[i + 1], 9)
  else
    redis.call('HDEL', KEYS[1], found[i])
  end
end
return alive
"""
)
