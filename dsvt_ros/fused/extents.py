"""Extents of the blocks that kernels work on."""

from __future__ import annotations

MIN_EXTENT = 16
"""What tensor cores take."""


def power_of_two(count: int) -> int:
    """The first that is not less than `count`, which is at least 1: blocks of kernels have no other extents."""
    return 1 << (count - 1).bit_length()
