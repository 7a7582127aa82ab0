"""Which CPU of the virtual supernode holds a block: consistent hashing of names to the DRAM of all its CPUs.

The supernode has 192 CPUs (48 nodes of 4); every one gives DRAM to the pool. Jump consistent hashing (Lamping and
Veach, 2014) spreads names evenly and moves only 1/n of them when an n-th CPU joins. The placement tag decides, so
neighbours of a chain lie on one CPU.
"""

import functools

from memory_pool.keys import tag_of

NUM_CPUS = 192

_MULTIPLIER = 2862933555777941757


def place_of(key: bytes, *, num_cpus: int = NUM_CPUS) -> str:
    """The place, e.g. `cpu:17`, in the notation of `fabric.topology`."""
    return f"cpu:{_jump(int.from_bytes(tag_of(key), 'little'), num_cpus)}"


@functools.lru_cache(maxsize=1 << 16)
def _jump(state: int, num_buckets: int) -> int:
    # A 32-bit tag is spread over 64 bits first: the hash wants a well-mixed start.
    state = (state * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & 0xFFFFFFFFFFFFFFFF
    bucket, candidate = 0, 0
    while candidate < num_buckets:
        bucket = candidate
        state = (state * _MULTIPLIER + 1) & 0xFFFFFFFFFFFFFFFF
        candidate = int((bucket + 1) * (float(1 << 31) / float((state >> 33) + 1)))
    return bucket
