"""The node while it builds engines, with a stand-in for TensorRT: it answers, tells how far it is, and can be ended."""

import json
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
from fakes.machine import RELEASE, ends
from harness import NodeProcess

import dsvt_ros.export.folder as folders
from dsvt_ros.model.folder import open_model

pytest_plugins = ("fakes.fixtures",)
pytestmark = pytest.mark.ros

TEST = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tiny_model, tiny_exports, tmp_path_factory):
    """Exported beforehand, for that takes seconds in which nothing is built."""
    folder, output = open_model(tiny_model), tmp_path_factory.mktemp("tiny") / "exported"
    with mock.patch.object(folders, "export_networks", tiny_exports):
        folders.export_folder(folder, folder.weights, output, folders.ExportOptions(voxels=300))
    return output


@pytest.fixture
def start(ros, model, tmp_path, monkeypatch):
    """Starts the node with builds of so many seconds each; the cache and TensorRT's log lie in `tmp_path`."""
    nodes = []

    def start(seconds, **more):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TEST.parent), str(TEST)]))
        monkeypatch.setenv("FAKE_TENSORRT_VERSION", RELEASE)
        monkeypatch.setenv("FAKE_TENSORRT_BUILD_S", str(seconds))
        monkeypatch.setenv("FAKE_TENSORRT_LOG", str(tmp_path / "tensorrt.log"))
        parameters = {
            "model": model,
            "backend": "tensorrt",
            "device": "cpu",
            "engine.precision": "fp32",
            "engine.cache_dir": tmp_path / "cache",
            "diagnostics.period_s": 0.2,
            **more,
        }
        nodes.append(NodeProcess(tmp_path / f"node{len(nodes)}.log", parameters, "fakes.node"))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait()


def builders(folder):
    """Processes that have begun to build."""
    log = folder / "tensorrt.log"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [event["pid"] for event in events if event["event"] == "build"]


def engines(folder):
    return sorted(path.name.split("-")[1] for path in (folder / "cache").rglob("*.engine"))


def test_answers_and_reports_while_it_builds(start, client, tmp_path):
    node = start(2.5)
    seen = []

    def building():
        seen.extend(status.message for message in client.diagnostics for status in message.status)
        client.diagnostics.clear()
        return any(message.startswith("building the sparse network of tiny for 300 voxels") for message in seen)

    assert client.spin_until(building), node.output
    asked = time.monotonic()
    assert client.get_parameter("backend").string_value == "tensorrt"
    assert time.monotonic() - asked < 2.0
    assert "active: waiting for clouds" not in node.output  # still building when it answered
    node.wait_for("active: waiting for clouds")
    assert engines(tmp_path) == ["dense", "sparse"]
    client.spin_for(0.5)  # what was reported meanwhile has been waiting
    status, values = client.status()
    assert values["backend"] == "tensorrt"
    assert not status.message.startswith("building")
    assert node.end()[0] == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ends_in_the_middle_of_a_build(start, client, tmp_path, how):
    node = start(120.0)
    assert client.spin_until(lambda: builders(tmp_path)), node.output
    exit_code, seconds = node.end(how)
    assert exit_code == 0, node.output
    assert seconds < 5.0
    assert all(ends(pid) for pid in builders(tmp_path))
    assert engines(tmp_path) == []
    assert not list((tmp_path / "cache").rglob("*.partial*"))
    assert "Traceback" not in node.output


def test_build_only(start, tmp_path):
    node = start(0.0, build_only="true")
    assert node.process.wait(60) == 0, node.output
    assert engines(tmp_path) == ["dense", "sparse"]
    assert "active" not in node.output


def test_build_only_of_another_backend(start):
    node = start(0.0, build_only="true", backend="torch")
    assert node.process.wait(30) == 1
    assert "build_only builds TensorRT engines" in node.output
