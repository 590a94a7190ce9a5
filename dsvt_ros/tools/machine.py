"""What a figure was measured on and with."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsvt_ros import __version__

if TYPE_CHECKING:
    from dsvt_ros.detector import Detector


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor and, for CUDA, GPU."""
    described: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def versions(backends: Iterable[str]) -> dict[str, str]:
    """Versions of this package, of what it always needs, and of what the backends need."""
    found = {
        "dsvt_ros": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    names = {name.split()[0] for name in backends}
    for name in ("onnxruntime", "tensorrt", "triton"):
        if name in names:
            found[name] = importlib.import_module(name).__version__
    return found


def ran_with(detector: Detector) -> dict[str, Any]:
    """What found the boxes of a result, and where."""
    return {
        "model": detector.model.name,
        "backend": detector.backend,
        "precision": detector.precision,
        "hardware": hardware(detector.device),
        "versions": versions([detector.backend]),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # no Linux
        pass
    return platform.processor() or platform.machine()
