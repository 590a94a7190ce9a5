"""A machine that seems to have a GPU and TensorRT."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from dsvt_ros.backends.tensorrt import api, load
from dsvt_ros.backends.tensorrt.build import run_child

FAKES = Path(__file__).parent
RELEASE = "10.16.1"
GPU = "Fake GPU"
VOXELS = [512]

# The process of a user on that machine. Arguments: engine.cache_dir, model folder.
USER = """
import sys
from fakes.machine import VOXELS, pretended_machine
from dsvt_ros import Detector
with pretended_machine():
    overrides = {"engine.cache_dir": sys.argv[1], "engine.precision": "fp32", "engine.profile.voxels": VOXELS}
    Detector.load(sys.argv[2], backend="tensorrt", device="cpu", overrides=overrides)
print("loaded")
"""


@contextlib.contextmanager
def pretended_machine():
    """TensorRT can be imported, and torch describes a GPU; networks run on the CPU all the same."""
    real = sys.modules.get("tensorrt")

    def forget():
        sys.modules.pop("tensorrt", None)
        api.logger.cache_clear()

    def require_gpu(device):
        api.require_tensorrt()

    def name(device):
        return os.environ.get("FAKE_TENSORRT_GPU", GPU)

    def capability(device):
        major, minor = os.environ.get("FAKE_TENSORRT_COMPUTE", "9.0").split(".")
        return int(major), int(minor)

    with (
        mock.patch.object(sys, "path", [str(FAKES), *sys.path]),
        mock.patch.object(load, "require_gpu", require_gpu),
        mock.patch.object(torch.cuda, "get_device_name", name),
        mock.patch.object(torch.cuda, "get_device_capability", capability),
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(8 << 30, 16 << 30)),
    ):
        forget()
        try:
            yield
        finally:
            forget()
            if real is not None:
                sys.modules["tensorrt"] = real


@dataclass
class Machine:
    """What a test does with that machine."""

    monkeypatch: pytest.MonkeyPatch
    log: Path

    def release(self, version):
        """Install another release of TensorRT."""
        self.monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
        sys.modules.pop("tensorrt", None)
        api.logger.cache_clear()

    def gpu(self, name=GPU, compute="9.0"):
        """Plug in another GPU."""
        self.monkeypatch.setenv("FAKE_TENSORRT_GPU", name)
        self.monkeypatch.setenv("FAKE_TENSORRT_COMPUTE", compute)

    def use_processes(self):
        """Build in processes of their own, as everywhere but in tests."""
        self.monkeypatch.setattr(load, "run_child", run_child)

    def breaks(self, what):
        """Let something fail from now on; see `fakes.tensorrt.FAILURES`."""
        self.monkeypatch.setenv("FAKE_TENSORRT_FAIL", what)

    def slow(self, seconds):
        """How long every build takes."""
        self.monkeypatch.setenv("FAKE_TENSORRT_BUILD_S", str(seconds))

    def events(self, kind):
        """Builds or runs until now."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def builds(self):
        """Networks built until now."""
        return [event["network"] for event in self.events("build")]

    def wait_for_build(self):
        """The process that builds, as soon as there is one."""
        deadline = time.monotonic() + 30
        while not (events := self.events("build")):
            assert time.monotonic() < deadline, "nothing is built"
            time.sleep(0.02)
        return events[-1]["pid"]

    def start(self, cache_dir, model):
        """A user's process that loads a detector."""
        return subprocess.Popen(
            [sys.executable, "-c", USER, str(cache_dir), str(model)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def engine_of(cache_dir, network):
    """The one engine of a network in a cache folder."""
    (path,) = (cache_dir / "tensorrt").glob(f"tiny-{network}-*.engine")
    return path


def files_in(folder):
    """Names of all files below a folder that are no engines, sidecars or the like in their places."""
    belong = (".engine", ".engine.json", ".lock", ".cache")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if not name.endswith(belong) or name.startswith(".") or "/." in name]


def assert_same(found, expected, atol=1e-4):
    """The same boxes in the same order, as far as rounding lets them be."""
    assert len(found) == len(expected) > 0
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=atol)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=atol)


def assert_alike(found, expected):
    """Nearly all boxes are there in both, nearly the same: what half precision leaves of them."""
    assert len(expected) > 0
    for ours, theirs in ((found, expected), (expected, found)):
        near = np.linalg.norm(ours.boxes[:, None, :3] - theirs.boxes[None, :, :3], axis=2) < 0.05
        alike = np.abs(ours.scores[:, None] - theirs.scores[None]) < 0.02
        same = ours.labels[:, None] == theirs.labels[None]
        assert (near & alike & same).any(1).mean() > 0.9


def is_running(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid, within_s=10.0):
    """Whether a process ends in time."""
    deadline = time.monotonic() + within_s
    while is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True
