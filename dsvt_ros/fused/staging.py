"""Memory through which inputs reach the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PART_BYTES = 2 << 20
"""While so many bytes travel, the next ones are copied to where the device can fetch them."""
TURNS = 2
"""Frames that may be under way. Memory for inputs and outputs is there so many times and used in turns: that of the
next frame can be filled while the present one's is still needed."""


class Staging:
    """Memory on the host and as much on the device, both for each of `TURNS`.

    Attributes:
        hosts: Of each turn (size,); pinned where the device is a GPU.
        devices: Of each turn (size,).
        sent: End of what was sent in the present turn.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory, filled with zeros."""
        on_gpu = device.type == "cuda"
        self.hosts = tuple(torch.zeros(size, dtype=dtype, pin_memory=on_gpu) for _ in range(TURNS))
        self.devices = tuple(torch.zeros(size, dtype=dtype, device=device) for _ in range(TURNS))
        self._turn = self.sent = 0
        self._stream: torch.cuda.Stream | None = None
        if on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the zeros, and for who had the memory

    def turn(self) -> int:
        """Begin anew in the memory of the next turn, with which the device must have done; gives its number."""
        self._turn, self.sent = (self._turn + 1) % TURNS, 0
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
