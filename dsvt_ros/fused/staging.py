"""Memory through which inputs reach the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PART_BYTES = 2 << 20
"""While so many bytes travel, the next ones are copied to where the device can fetch them."""


class Staging:
    """Memory on the host and as much on the device, all of it twice.

    They are used in turns, so that the next frame's can be filled while the device still needs the present one's.

    Attributes:
        hosts: Two of (size,); pinned where the device is a GPU.
        devices: Two of (size,).
        sent: End of what was sent of the one whose turn it is.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory, filled with zeros."""
        on_gpu = device.type == "cuda"
        self.hosts = tuple(torch.zeros(size, dtype=dtype, pin_memory=on_gpu) for _ in range(2))
        self.devices = tuple(torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self._turn = self.sent = 0
        self._stream: torch.cuda.Stream | None = None
        if on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the zeros, and for who had the memory

    def turn(self) -> int:
        """Begin anew in the other memory, with which the device must have done; gives its number."""
        self._turn, self.sent = 1 - self._turn, 0
        return self._turn

    @contextmanager
    def sending(self, *, own_stream: bool) -> Iterator[None]:
        """Inside, `send`; what comes after on the current stream waits until everything is there.

        Args:
            own_stream: Whether copies go through a stream of their own, so that they do not wait for what the device
                works on. Where it does nothing, they are there sooner without.
        """
        if self._stream is None or not own_stream:
            yield
            return
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def send(self, end: int, target: Tensor) -> None:
        """Begin to copy what lies between the end of what was sent and `end`, if anything does, to `target`."""
        begin = self.sent
        if begin < end:
            target[begin:end].copy_(self.hosts[self._turn][begin:end], non_blocking=True)
            self.sent = end
