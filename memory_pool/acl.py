"""What each role may do in Redis: rules for `ACL SETUSER`, for a Redis that others use, too.

    ACL SETUSER worker on >PASSWORD <rules("worker")>

Every role is confined to the pool's own keys (`cm:*`) and has no administrative command.
"""

from typing import Literal

Role = Literal["worker", "gateway", "keeper"]

_COMMON = ["resetkeys", "~cm:*", "-@all", "+@connection", "+info", "+cluster", "+eval", "+evalsha", "+time"]
_READ = [
    "+exists",
    "+get",
    "+hget",
    "+hmget",
    "+hgetall",
    "+hlen",
    "+hexists",
    "+hvals",
    "+smembers",
    "+zscore",
]
_WRITE = [
    "+set",
    "+unlink",
    "+persist",
    "+pexpire",
    "+hset",
    "+hdel",
    "+hincrby",
    "+sadd",
    "+rpush",
    "+ltrim",
    "+llen",
]
_COUNT = [
    "+hset",
    "+hsetnx",
    "+hdel",
    "+hincrby",
    "+set",
    "+pexpire",
    "+zadd",
    "+zrem",
    "+zcard",
    "+zremrangebyscore",
]
_MORE = ["+zadd", "+zrem", "+zremrangebyrank"]
_KEEP = ["+lrange", "+zrange", "+strlen", "+scan", "+hsetnx"]


def rules(role: Role) -> list[str]:
    """The gateway asks, announces and counts what callers use; workers also read and write blocks; the keeper also
    lists and moves them."""
    granted = _COMMON + _READ
    if role == "gateway":
        return [*granted, *_COUNT]
    granted = granted + _WRITE + _MORE
    return granted + _KEEP if role == "keeper" else granted
