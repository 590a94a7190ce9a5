"""What warp-specialised kernels for Hopper have in common: registers of their parts, and rings in shared memory.

A ring streams blocks from a producer to consumers, turn after turn, each into the next of its slots. For each slot it
has a barrier `full`, which counts bytes that have come, and a barrier `free`, at which everyone arrives who has read
the slot; both are (slots, 1) int64 in shared memory. The phases of a barrier differ in one bit only: whoever waits for
a phase has to have seen the one before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Registers a thread: 3 warpgroups of 168 are what a multiprocessor has; most go to the consumers.
NUM_WARPS = 4
MAX_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
OTHER_REGISTERS = gl.constexpr(24)

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def start_slot(full, free, turn, BYTES: gl.constexpr):
    """Wait for room, and announce bytes; gives the barrier at which they arrive."""
    slot = turn % full.shape[0]
    # A barrier that was never used counts as past its phase 1, so the first turn of each slot does not wait.
    mbarrier.wait(free.index(slot), turn // full.shape[0] & 1 ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    return full.index(slot)


@gluon.jit
def await_slot(full, turn):
    """Wait for what a turn brings; gives its slot."""
    slot = turn % full.shape[0]
    mbarrier.wait(full.index(slot), turn // full.shape[0] & 1)
    return slot


@gluon.jit
def release_slot(free, turn):
    """Say that this warpgroup has read what a turn brought."""
    # Of one thread: all four warps must have come this far.
    gl.thread_barrier()
    mbarrier.arrive(free.index(turn % free.shape[0]), count=1)
