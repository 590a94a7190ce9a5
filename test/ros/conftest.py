"""The node as a process of its own, and a client to talk to it, in an isolated ROS graph."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import Client, NodeProcess

SMALL_MODEL = """
model:
  name: small
  class_names: [car, pedestrian, cyclist]
  point_cloud_range: [-12.8, -12.8, -2.0, 12.8, 12.8, 4.0]
  voxel_size: [0.32, 0.32, 6.0]
  features: [{name: x}, {name: y}, {name: z}, {name: intensity, scale: tanh, fill: 0.25}]
  ground_z: 0.0
  encoder: {channels: [32, 32]}
  backbone_3d:
    channels: 32
    ffn_channels: 32
    num_heads: 2
    stages: [{num_blocks: 1, set_size: 36, windows: [[12, 12, 1], [24, 24, 1]], offsets: [[0, 0, 0], [6, 6, 0]]}]
  backbone_2d:
    {blocks: [1, 1], strides: [2, 2], channels: [32, 32], upsample_strides: [1, 2], upsample_channels: [16, 16]}
  head: {shared_channels: 16}
defaults:
  preprocess: {find_ground: true}
  postprocess: {score_threshold: 0.3, iou_rectifier: [0.5, 0.5, 0.5], nms_iou: [0.2, 0.3, 0.3]}
"""

HAS_ROS = importlib.util.find_spec("rclpy") is not None


@pytest.fixture(scope="session")
def ros() -> Iterator[None]:
    """rclpy in this process, in a domain of its own that child processes share."""
    if not HAS_ROS:
        pytest.skip("rclpy is not installed")
    import rclpy

    from dsvt_ros.ros.local_dds import isolated_environment

    before = dict(os.environ)
    os.environ.update(isolated_environment())
    rclpy.init()
    yield
    rclpy.try_shutdown()
    os.environ.clear()
    os.environ.update(before)


def write_small_model(folder: Path, description: str) -> Path:
    """A model folder that answers random clouds quickly and with boxes, though not with right ones."""
    from safetensors.torch import save_file

    from dsvt_ros.model.dsvt import DSVT
    from dsvt_ros.model.folder import open_model

    (folder / "model.yaml").write_text(description)
    torch.manual_seed(3)
    state = DSVT(open_model(folder).model).state_dict()
    head = "dense_head.heads_list.0"
    state[f"{head}.hm.1.weight"] *= 400.0  # peaks that stand out
    state[f"{head}.iou.1.bias"] += 1.0
    save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("small"), SMALL_MODEL)


@pytest.fixture(scope="session")
def sweep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a feature for the age of sweeps, of which it takes three."""
    description = SMALL_MODEL.replace("fill: 0.25}]", "fill: 0.25}, {name: time}]\n  sweeps: 3")
    return write_small_model(tmp_path_factory.mktemp("sweeps"), description.replace("find_ground: true", ""))


@pytest.fixture(scope="module")
def start_node(ros: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., NodeProcess]]:
    """Starts node processes and ends those that the tests leave."""
    folder = tmp_path_factory.mktemp("node")
    nodes: list[NodeProcess] = []

    def start(**parameters: object) -> NodeProcess:
        dotted = {name.replace("__", "."): value for name, value in parameters.items()}
        nodes.append(NodeProcess(folder / f"{len(nodes)}.log", dotted))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            # Asked first: one that just vanishes is taken for alive by its peers, who wait for its services.
            node.process.terminate()
            try:
                node.process.wait(10)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()


@pytest.fixture(scope="module")
def client(ros: None) -> Iterator[Client]:
    client = Client()
    yield client
    client.close()
