"""How the process shares the processor's cores."""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Let threads that wait for each other sleep instead of spinning.

    A network on the CPU splits each operation over all cores. Threads that spin until the last one is done take the
    core that it needs as soon as any other process runs: with one busy neighbour on two cores a frame took 2.4 s, and
    0.4 s without spinning. Call it before torch is imported, which reads the variable once; a value that the user has
    set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
