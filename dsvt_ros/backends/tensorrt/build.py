"""Building an engine in a child process that can be watched, limited and ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dsvt_ros.backends import Progress
from dsvt_ros.backends.tensorrt.child import BuildRequest, request_text
from dsvt_ros.errors import EngineError

_LOG = logging.getLogger(__name__)

POLL_S = 0.2
HOST_MEMORY_SHARE = 0.8
"""Of the free host memory, what a build may take before it is stopped."""


def run_child(request: BuildRequest, environment: Mapping[str, str], what: str, progress: Progress) -> dict[str, Any]:
    """Build the engine that `request` describes.

    Whatever ends the wait, an exception of `progress` or Ctrl-C included, ends the child too.

    Args:
        request: What to build.
        environment: All environment variables of the child.
        what: The engine, for messages.
        progress: Called several times a second.

    Returns:
        The child's report.

    Raises:
        EngineError: It cannot be built, or not within the free memory.
    """
    limit = free_host_memory() * HOST_MEMORY_SHARE
    folder = Path(tempfile.mkdtemp(prefix="dsvt_build_"))
    started, stage, fraction = time.monotonic(), "starting", None
    child: subprocess.Popen[bytes] | None = None
    try:
        (folder / "request.json").write_text(request_text(request))
        with (folder / "stderr").open("w+b") as errors:
            module = "dsvt_ros.backends.tensorrt.child"
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(folder / "request.json"), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches us alone
            )
            assert child.stdout is not None
            lines = _Lines(child.stdout)
            answer: dict[str, Any] = {}
            while not lines.ended:
                for content in lines.read(POLL_S):
                    stage, fraction = content.get("stage", stage), content.get("fraction", fraction)
                    answer = content if "stage" not in content else answer
                used = resident_memory(child.pid)
                if used > limit:
                    raise EngineError(
                        f"building {what} took more than {limit / 2**20:.0f} MiB of host memory, "
                        f"{HOST_MEMORY_SHARE:.0%} of what was free, and was stopped: end other programs, or build with "
                        f"a lower engine.optimization_level"
                    )
                progress(f"building {what}: {stage}, {time.monotonic() - started:.0f} s", fraction)
            status = child.wait()
            if "report" in answer and status == 0:
                report: dict[str, Any] = answer["report"]
                return report
            errors.seek(0)
            raise EngineError(f"cannot build {what}: {answer.get('error') or _reason(status, errors)}")
    finally:
        if child is not None and child.poll() is None:
            child.kill()
            child.wait()
        if child is not None and child.stdout is not None:
            child.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Lines:
    """JSON objects, one a line, that come through a pipe, without waiting longer than told."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.ended = False
        self._pipe, self._rest = pipe, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)

    def read(self, timeout_s: float) -> list[dict[str, Any]]:
        """What has come within that time; other lines, which TensorRT's libraries print, are left out."""
        if not self._selector.select(timeout_s):
            return []
        content = os.read(self._pipe.fileno(), 1 << 16)
        if not content:
            self.ended = True
            self._selector.close()
        *lines, self._rest = (self._rest + content).split(b"\n")
        objects = []
        for line in lines:
            with contextlib.suppress(ValueError):
                content = json.loads(line)
                objects += [content] if isinstance(content, dict) else []
        return objects


def _reason(status: int, errors: IO[bytes]) -> str:
    if status == -9:
        return "its process was killed, as the system does when memory runs out"
    last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"its process ended with status {status}" + (f": {last[0]}" if last else "")


def free_host_memory() -> float:
    """Bytes that programs can still take; infinite where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")


def resident_memory(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def child_environment(device_index: int) -> dict[str, str]:
    """Our environment with one GPU in sight, the one that has this index for us."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    chosen = names[device_index].strip() if device_index < len(names) else str(device_index)
    # Also without an installed package: the child must find the same one.
    search = [entry for entry in sys.path if entry and Path(entry).is_dir()]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": chosen, "PYTHONPATH": os.pathsep.join(search)}
