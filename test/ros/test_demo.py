"""The demonstration: what it leaves behind, and that it fails where it must."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsvt_ros.io.bags import topics_of_bag
from dsvt_ros.model.folder import open_model

DEMO = [sys.executable, "-m", "dsvt_ros.tools.cli", "demo"]
SHIPPED = open_model("demo").weights

needs_weights = pytest.mark.skipif(SHIPPED is None, reason="the model demo has no weights yet")


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEMO, *map(str, arguments)], capture_output=True, text=True, timeout=280)


def children_of(pid: int) -> list[int]:
    """Processes of the session that a command was started in."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            pids.append(int(path.name))
    return [other for other in pids if other != pid]


@needs_weights
def test_without_ros(tmp_path):
    result = demo("--no-ros", "--frames", "6", "--output-dir", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    found, known = map(int, re.fullmatch(r"(\d+) of (\d+) objects found", last).groups())
    assert found >= 0.8 * known > 0
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    numbers = {topic.name: topic.num_messages for topic in topics_of_bag(tmp_path / "demo_bag")}
    assert numbers["/lidar/points"] == numbers["/dsvt_detector/output/detections"] == 6


@needs_weights
def test_permuted_weights_fail(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        key: rng.permutation(value.reshape(-1)).reshape(value.shape) if value.ndim > 1 else value
        for key, value in load_file(SHIPPED).items()
    }
    save_file(weights, tmp_path / "permuted.safetensors")
    result = demo("--no-ros", "--frames", "3", "--output-dir", tmp_path, "--weights", tmp_path / "permuted.safetensors")
    assert result.returncode == 1, result.stdout
    assert "objects found" in result.stdout.splitlines()[-1]


@pytest.mark.ros
@needs_weights
def test_over_dds(ros, tmp_path):
    result = demo("--frames", "6", "--output-dir", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 clouds sent, 6 answered" in result.stdout
    numbers = {topic.name: topic.num_messages for topic in topics_of_bag(tmp_path / "demo_bag")}
    assert numbers["/lidar/points"] == numbers["/dsvt_detector/output/detections"] == 6


@pytest.mark.ros
def test_node_that_does_not_start_is_quoted(ros, tmp_path):
    result = demo("--frames", "1", "--output-dir", tmp_path, "--weights", tmp_path / "none.safetensors")
    assert result.returncode == 1
    assert "the node ended with exit code 1 before it was active" in result.stderr
    assert "none.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.ros
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_process(ros, tmp_path, how):
    command = [*DEMO, "--frames", "2", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=dict(os.environ))
    while "2/4" not in process.stdout.readline():
        assert process.poll() is None
    deadline = time.monotonic() + 10
    while len(children_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children_of(process.pid)) >= 2
    process.send_signal(how)
    assert process.wait(15) == 130
    assert children_of(process.pid) == []
