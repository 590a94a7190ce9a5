"""How the process keeps its memory between two clouds."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_BUFFER = 32 << 20
_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Let freed buffers serve the next cloud instead of going back to the kernel.

    Every cloud needs the same large buffers. By default glibc maps each of them anew, and the kernel fills every page
    with zeros when it is first touched: on the CPU a fifth of the time of a frame. Threads started later share one
    arena, the only one that can keep memory. Call it before starting threads; elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BUFFER)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
