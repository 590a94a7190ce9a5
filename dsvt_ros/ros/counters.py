"""Counts and times of the node between two diagnostics messages."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Counts:
    """Clouds since the node was configured; `answered` is what was published."""

    received: int = 0
    answered: int = 0
    dropped: int = 0
    refused: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Report:
    """What happened since the last report.

    Attributes:
        counts: Since the node was configured.
        recent: The same, since the last report.
        rate_hz: Answers a second.
        processing_ms: Of each answer, from taking the cloud to publishing.
        latency_ms: Of each answer, from the cloud's stamp to publishing.
        since_cloud_s: Age of the newest cloud; None if none came since activation.
        last_error: The newest error, empty if there was none.
    """

    counts: Counts
    recent: Counts
    rate_hz: float
    processing_ms: tuple[float, ...]
    latency_ms: tuple[float, ...]
    since_cloud_s: float | None
    last_error: str


@dataclass
class Counters:
    """Collects from the executor's and the worker's thread; `report` starts a new period."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counts: Counts = Counts()
    _reported: Counts = Counts()
    _since: float = field(default_factory=time.monotonic)
    _last_cloud: float | None = None
    _processing_ms: list[float] = field(default_factory=list)
    _latency_ms: list[float] = field(default_factory=list)
    _last_error: str = ""

    def received(self, *, replaced: bool) -> None:
        """A cloud arrived; `replaced`: an older one was dropped for it."""
        with self._lock:
            self._count(received=1, dropped=int(replaced))
            self._last_cloud = time.monotonic()

    def dropped(self) -> None:
        """A waiting cloud was given up."""
        with self._lock:
            self._count(dropped=1)

    def refused(self, error: str) -> None:
        """A cloud could not be read."""
        with self._lock:
            self._count(refused=1)
            self._last_error = error

    def failed(self, error: str) -> None:
        """A cloud was read but not processed; its answer is empty."""
        with self._lock:
            self._count(failed=1)
            self._last_error = error

    def answered(self, processing_ms: float, latency_ms: float) -> None:
        """An answer was published."""
        with self._lock:
            self._count(answered=1)
            self._processing_ms.append(processing_ms)
            self._latency_ms.append(latency_ms)

    def restart(self) -> None:
        """Forget the age of the last cloud: the subscription is new."""
        with self._lock:
            self._last_cloud = None

    def report(self) -> Report:
        """What happened since the last call."""
        with self._lock:
            now = time.monotonic()
            counts, before = self._counts, self._reported
            recent = Counts(*(getattr(counts, f) - getattr(before, f) for f in _FIELDS))
            report = Report(
                counts=counts,
                recent=recent,
                rate_hz=recent.answered / max(now - self._since, 1e-9),
                processing_ms=tuple(self._processing_ms),
                latency_ms=tuple(self._latency_ms),
                since_cloud_s=None if self._last_cloud is None else now - self._last_cloud,
                last_error=self._last_error,
            )
            self._since, self._reported = now, counts
            self._processing_ms, self._latency_ms = [], []
            return report

    def _count(self, **more: int) -> None:
        changed = {name: getattr(self._counts, name) + number for name, number in more.items()}
        self._counts = replace(self._counts, **changed)


_FIELDS = tuple(Counts.__dataclass_fields__)


def percentile(values: tuple[float, ...], percent: float) -> float:
    """Percentile of measured times, NaN where there are none."""
    return float(np.percentile(values, percent)) if values else float("nan")
