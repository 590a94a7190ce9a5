"""A frame as one CUDA graph; nothing else in the package knows of CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

WARM_UPS = 2
"""Runs before capturing: the first one compiles kernels, and libraries choose theirs."""


class RunStage(Protocol):
    """Runs a stage of a frame: `stage(name, function, *arguments)` is `function(*arguments)`."""

    def __call__(self, name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of `function`."""
        ...


def run_stage(name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run it, and no more."""
    return function(*args, **kwargs)


def timing_event() -> torch.cuda.Event:
    """An event whose time on the device can be told."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


class FrameGraph:
    """Launches of kernels, captured once and replayed, with the same tensors as input and output.

    Attributes:
        output: What the frame gave when it was last replayed; the next replay may overwrite it.
    """

    def __init__(self, frame: Callable[[RunStage], Tensor], pool: Any) -> None:
        """Capture.

        Args:
            frame: Runs every stage through its argument; never waits for the device, and takes its inputs from tensors
                that stay where they are.
            pool: Memory that several graphs share (`torch.cuda.graph_pool_handle`), of which one runs at a time.
        """
        self._frame, self._pool = frame, pool
        self._stages: list[tuple[str, torch.cuda.CUDAGraph]] = []
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                frame(run_stage)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with _capture(self._graph, pool):
            self._whole = frame(run_stage)
        self._of_stages: Tensor | None = None
        self.output = self._whole

    def replay(self) -> None:
        """Run all stages on the current stream."""
        self._graph.replay()
        self.output = self._whole

    def replay_stages(self) -> dict[str, float]:
        """Run them one by one, each a graph of its own; gives the milliseconds of each on the device."""
        if self._of_stages is None:
            self._stages.clear()  # an attempt that failed may have left some
            self._of_stages = self._frame(self._capture_stage)
        self.output = self._of_stages
        events = [timing_event() for _ in range(len(self._stages) + 1)]
        events[0].record()
        for event, (_, graph) in zip(events[1:], self._stages, strict=True):
            graph.replay()
            event.record()
        events[-1].synchronize()
        return {
            name: before.elapsed_time(after)
            for (name, _), before, after in zip(self._stages, events, events[1:], strict=False)
        }

    def _capture_stage(self, name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        graph = torch.cuda.CUDAGraph()
        with _capture(graph, self._pool):
            result = function(*args, **kwargs)
        self._stages.append((name, graph))
        return result


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture into `graph` what is launched inside; other threads may use the device meanwhile."""
    torch.cuda.synchronize()
    # An older graph that is collected meanwhile, being part of a cycle, would break the capture.
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        stream = _capture_stream(torch.cuda.current_device())
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            yield
    finally:
        if collects:
            gc.enable()


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures on a device, as graphs share memory only then; torch's own is on a single device."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
