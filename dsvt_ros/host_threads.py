"""How the process shares the processor's cores."""

from __future__ import annotations

import os

# About 0.1 ms of waiting for another core before a thread goes to sleep.
_SPINS = "5000"


def spin_briefly() -> None:
    """Let threads that wait for each other go to sleep soon.

    A network on the CPU splits each operation over all cores. By default the threads that are done spin until the last
    one is, and take the core that it needs as soon as any other process runs: with one busy neighbour on two cores a
    frame took 2.4 s, and 0.35 s with a short wait; on an idle machine both take the same. Call it before torch is
    imported, which reads the variable once. A policy that the user has set stays. It speaks to GNU's OpenMP, which
    PyTorch's Linux builds use.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
