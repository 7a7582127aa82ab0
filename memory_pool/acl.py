"""What each role may do in Redis: rules for `ACL SETUSER`, for Redis 6.2 and later.

    ACL SETUSER worker on >PASSWORD <rules("worker")>

A role reaches the keys that it works with and runs the commands that it needs, by name: nobody may administer the
server, and the gateway has no command that could bring a block's value out of it.
"""

from typing import Literal

Role = Literal["gateway", "worker", "keeper"]
ROLES: tuple[Role, ...] = ("gateway", "worker", "keeper")

_CONNECT = [
    *("resetkeys", "resetchannels", "-@all", "+@connection", "-client", "+select", "+readonly", "+asking"),
    *("+command", "+cluster|slots", "+cluster|shards", "+cluster|nodes", "+info", "+time", "+eval"),
]
_GATEWAY_KEYS = [
    *("~cm:b:*", "~cm:dir:*", "~cm:q:*", "~cm:ns:*", "~cm:namespaces"),
    *("~cm:shared", "~cm:pins", "~cm:disk", "~cm:keeper"),
]
_GATEWAY = [
    *("+exists", "+pexpire", "+smembers"),
    *("+hget", "+hgetall", "+hlen", "+hexists", "+hset", "+hsetnx", "+hdel", "+hincrby"),
    *("+zadd", "+zcard", "+zrem", "+zremrangebyscore"),
]
_WORKER = [
    *("+get", "+set", "+exists", "+unlink", "+persist", "+pexpire", "+sadd", "+rpush", "+llen", "+ltrim"),
    *("+hget", "+hmget", "+hgetall", "+hexists", "+hset", "+hdel", "+hincrby"),
    *("+zadd", "+zrem", "+zscore", "+zremrangebyrank"),
]
_KEEPER = [
    *("+scan", "+strlen", "+smembers", "+srem", "+lrange", "+hlen", "+hvals", "+hsetnx"),
    "+zrange",
]


def rules(role: Role) -> list[str]:
    """The gateway asks, announces and counts what callers use; workers also read and write blocks; the keeper also
    lists and moves them. What a user was granted before is taken back.
    """
    if role == "gateway":
        return [*_CONNECT, *_GATEWAY_KEYS, *_GATEWAY]
    return [*_CONNECT, "~cm:*", *_WORKER, *(_KEEPER if role == "keeper" else [])]
