"""A few threads that walk through the phases of a step together.

A step is a row of phases, a phase a number of chunks. One word holds the serial number of the current phase and how
many chunks are taken from its front and from its back; a thread takes a chunk by compare-and-swap, so it can only
take one of the phase it believes in. One half of the threads takes from the front, the other from the back, until
they meet: chunks go by rows, so a row stays with one core from phase to phase, in its caches, as long as both are
equally fast. Whoever finishes the last chunk opens the next phase. A phase ends when its chunks are done, not when
all threads have come: a thread that the system has taken off its core holds up at most the chunk it is in. Who waits
for that spins for a moment, then sleeps: on a machine with more threads than cores the core it leaves may be the one
that the other thread needs.
"""

import ctypes
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from engine.kernels.jit import inline, intrinsic, jit, types
from engine.kernels.packing import aligned
from engine.kernels.simd import I64, pointer

# Words of the control block, one cache line each.
TICKET, DONE, FIRST, PHASES, WAKE, SLEEPERS, STOP, WAITERS = (8 * line for line in range(8))
CONTROL_BYTES = 8 * 64
END_BITS = 16
CHUNK_BITS = 2 * END_BITS
SPINS = 4000
YIELDS = 200

FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE = 128, 129
ALL_SLEEPERS = 64
FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}
"""Number of the futex system call on Linux, by machine."""

sched_yield = types.ExternalFunction("sched_yield", types.int32())
usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:
    """Read a word after everything its writer did before."""

    def codegen(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        return b.load_atomic(pointer(b, a[0], I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(context: Any, address: Any, value: Any) -> Any:
    """Write a word after everything done before."""

    def codegen(c: Any, b: Any, _s: Any, a: Any) -> Any:
        b.store_atomic(a[1], pointer(b, a[0], I64), "seq_cst", 8)
        return c.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def atomic_add(context: Any, address: Any, value: Any) -> Any:
    """Add to a word; the value before."""

    def codegen(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        return b.atomic_rmw("add", pointer(b, a[0], I64), a[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_and_swap(context: Any, address: Any, old: Any, new: Any) -> Any:
    """Replace a word that is still `old`; whether it was."""

    def codegen(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        result = b.cmpxchg(pointer(b, a[0], I64), a[1], a[2], "seq_cst", "seq_cst")
        return b.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(context: Any) -> Any:
    """A breath in a spinning loop."""

    def codegen(c: Any, b: Any, _s: Any, _a: Any) -> Any:
        # A fence keeps the compiler from folding the loop; the spin itself is short.
        b.fence("seq_cst") if _HAS_PAUSE is None else b.call(_pause(b), [])
        return c.get_dummy_value()

    return types.none(), codegen


_HAS_PAUSE = {"x86_64": "llvm.x86.sse2.pause", "amd64": "llvm.x86.sse2.pause"}.get(platform.machine().lower())


def _pause(builder: Any) -> Any:
    name = str(_HAS_PAUSE)
    existing = builder.module.globals.get(name)
    return existing or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)


@inline
def wait_for_change(address: int, seen: int, spins: int) -> Any:
    """Spin, then give the core away, until the word differs from `seen` or patience (`spins`) ends."""
    for _ in range(spins):
        if atomic_load(address) != seen:
            return True
        pause()
    for _ in range(YIELDS):
        if atomic_load(address) != seen:
            return True
        sched_yield()
    return False


@inline
def open_phase(control: int, serial: int, futex_call: int) -> None:
    """Make `serial` the current phase, none of whose chunks is taken, and wake who waits for it."""
    atomic_store(control + TICKET * 8, serial << CHUNK_BITS)
    if futex_call != 0 and atomic_load(control + WAITERS * 8) > 0:
        syscall(futex_call, control + TICKET * 8 + 4, FUTEX_WAKE_PRIVATE, ALL_SLEEPERS, 0, 0, 0)


@inline
def wait_for_next_phase(control: int, ticket: int, futex_call: int) -> None:
    """All chunks of the ticket's phase are taken: return when another one is current, or when that may be."""
    for _ in range(SPINS):
        if atomic_load(control + TICKET * 8) != ticket:
            return
        pause()
    if futex_call == 0:
        sched_yield()
        return
    atomic_add(control + WAITERS * 8, 1)
    # The serial number is the upper half of the word, on machines whose lower half comes first as all these do.
    serial = serial_of(ticket) & 0xFFFFFFFF
    syscall(futex_call, control + TICKET * 8 + 4, FUTEX_WAIT_PRIVATE, serial, 0, 0, 0)
    atomic_add(control + WAITERS * 8, -1)


@inline
def serial_of(ticket: int) -> Any:
    """The serial number of a ticket's phase: 32 bits that start again when they are used up."""
    return ticket >> CHUNK_BITS


@inline
def phases_since(serial: int, first: int) -> Any:
    """How many phases `serial` comes after `first`; negative: before."""
    half = 1 << (CHUNK_BITS - 1)
    return ((serial - first + half) & ((1 << CHUNK_BITS) - 1)) - half


@inline
def taken(ticket: int) -> Any:
    """Chunks that are taken, from both ends."""
    return (ticket & ((1 << END_BITS) - 1)) + (ticket >> END_BITS & ((1 << END_BITS) - 1))


@inline
def chunk_of(ticket: int, count: int, worker: int) -> Any:
    """The chunk that is the worker's when it takes the next from its end."""
    if worker % 2 == 0:
        return ticket & ((1 << END_BITS) - 1)
    return count - 1 - (ticket >> END_BITS & ((1 << END_BITS) - 1))


@inline
def next_ticket(ticket: int, worker: int) -> Any:
    """The ticket once the worker has taken that chunk."""
    return ticket + (1 << worker % 2 * END_BITS)


@jit
def sleep_until_woken(control: int, futex_call: int) -> None:
    """A helper between steps: returns when there may be work, or to stop."""
    ticket = atomic_load(control + TICKET * 8)
    if wait_for_change(control + TICKET * 8, ticket, SPINS):
        return
    wake = atomic_load(control + WAKE * 8)
    atomic_add(control + SLEEPERS * 8, 1)
    if atomic_load(control + TICKET * 8) == ticket and atomic_load(control + STOP * 8) == 0:
        if futex_call != 0:
            # The low half of the wake word: it has not moved since it was read, or the call returns at once.
            syscall(futex_call, control + WAKE * 8, FUTEX_WAIT_PRIVATE, wake & 0xFFFFFFFF, 0, 0, 0)
        else:
            usleep(200)
    atomic_add(control + SLEEPERS * 8, -1)


@jit
def wake_helpers(control: int, futex_call: int) -> None:
    """After opening a phase: get sleeping helpers up."""
    atomic_add(control + WAKE * 8, 1)
    if futex_call != 0 and atomic_load(control + SLEEPERS * 8) > 0:
        syscall(futex_call, control + WAKE * 8, FUTEX_WAKE_PRIVATE, ALL_SLEEPERS, 0, 0, 0)


class Team:
    """The helper threads of one model, and their control block. `help_step(worker)` is one helper's part of a step."""

    def __init__(self, num_threads: int, help_step: Callable[[int], None]) -> None:
        self.control: NDArray[np.int64] = aligned(CONTROL_BYTES).view(np.int64)
        self.control[TICKET] = 1 << CHUNK_BITS
        on_linux = platform.system() == "Linux" and ctypes.sizeof(ctypes.c_void_p) == 8
        self.futex_call = FUTEX_CALLS.get(platform.machine().lower(), 0) if on_linux else 0
        self._help_step = help_step
        self._threads = [
            threading.Thread(target=self._help, args=(worker,), name=f"kernel-helper-{worker}", daemon=True)
            for worker in range(1, num_threads)
        ]

    def start(self) -> None:
        """Start the helpers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the helpers and wait for them."""
        self.control[STOP] = 1
        wake_helpers(self.address, self.futex_call)
        for thread in self._threads:
            thread.join()
        self._threads = []

    @property
    def address(self) -> int:
        """Where the control block lies."""
        return int(self.control.ctypes.data)

    def _help(self, worker: int) -> None:
        while not self.control[STOP]:
            sleep_until_woken(self.address, self.futex_call)
            self._help_step(worker)
