"""Memory through which inputs reach the device."""

from __future__ import annotations

import torch

PART_BYTES = 1 << 20
"""While so many bytes travel, the next ones are copied to where the device can fetch them."""


class Staging:
    """As much memory on the device and, twice, on the host.

    The host's are used in turns, so that one can be filled while the device still has to fetch the other.

    Attributes:
        hosts: (size,) each; pinned where the device is a GPU.
        device: (size,) copy of the one whose turn it is, as far as it was sent.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory, filled with zeros."""
        pinned = device.type == "cuda"
        self.hosts = tuple(torch.zeros(size, dtype=dtype, pin_memory=pinned) for _ in range(2))
        self.device = torch.zeros(size, dtype=dtype, device=device)
        self._turn = self._sent = 0

    def turn(self) -> int:
        """Begin anew in the host's other memory, of which the device must have fetched all; gives its number."""
        self._turn, self._sent = 1 - self._turn, 0
        return self._turn

    def send(self, end: int) -> None:
        """Begin to copy to the device what lies between the end of what was sent and `end`, if anything does."""
        begin = self._sent
        if begin < end:
            self.device[begin:end].copy_(self.hosts[self._turn][begin:end], non_blocking=True)
            self._sent = end
