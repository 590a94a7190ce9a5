"""How long each stage of a frame took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class StageClock:
    """Times the calls of wrapped functions.

    On CUDA every stage ends with a synchronisation while `enabled`, so that its own time is seen; the sum is then
    larger than an untimed frame.
    """

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cpu"
        self.timing_ms: dict[str, float] = {}
        self._device = device

    def restart(self) -> None:
        """Forget the times of the cloud before."""
        self.timing_ms = {}

    def time(self, stage: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, timed as `stage` while the clock is enabled."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            if not self.enabled:
                return function(*args, **kwargs)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.timing_ms[stage] = 1e3 * (time.perf_counter() - start)
            return result

        return timed
