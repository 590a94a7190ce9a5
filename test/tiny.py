"""A model small enough to be exported and run in a moment, with every part of the real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from dsvt_ros.config import (
    Backbone2dConfig,
    Backbone3dConfig,
    CenterHeadConfig,
    EncoderConfig,
    ModelConfig,
    StageConfig,
    TransFusionHeadConfig,
)
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model


def tiny_config() -> ModelConfig:
    return dataclasses.replace(
        open_model("demo").model,
        name="tiny",
        point_cloud_range=(-5.12, -5.12, -2.0, 5.12, 5.12, 4.0),
        encoder=EncoderConfig(channels=(16, 16)),
        backbone_3d=Backbone3dConfig(
            channels=16, ffn_channels=32, num_heads=2,
            stages=(StageConfig(2, 6, windows=((6, 6, 1), (10, 10, 1)), offsets=((0, 0, 0), (3, 3, 0))),),
        ),
        backbone_2d=Backbone2dConfig(
            blocks=(1, 2), strides=(2, 2), channels=(8, 16), upsample_strides=(1, 2), upsample_channels=(8, 8)
        ),
        head=CenterHeadConfig(shared_channels=8),
    )  # fmt: skip


def tiny_voxel_config() -> ModelConfig:
    """Three stages, the second of which uses one window shift only, and two groups of classes with velocities."""
    return dataclasses.replace(
        tiny_config(),
        name="tiny_voxel",
        voxel_size=(0.32, 0.32, 0.75),
        backbone_3d=Backbone3dConfig(
            channels=16, ffn_channels=32, num_heads=2,
            stages=(
                StageConfig(2, 6, windows=((6, 6, 8), (10, 10, 4)), offsets=((0, 0, 0), (3, 3, 2)), pool_z=4),
                StageConfig(1, 5, windows=((6, 6, 2), (10, 10, 2)), offsets=((0, 0, 0), (3, 3, 0)), pool_z=2),
                StageConfig(1, 4, windows=((6, 6, 1), (10, 10, 1)), offsets=((0, 0, 0), (3, 3, 0))),
            ),
        ),
        head=CenterHeadConfig(
            shared_channels=8, branches=("center", "center_z", "dim", "rot", "vel", "iou", "hm"),
            groups=(("pedestrian",), ("cyclist", "car")), bias_before_norm=True,
        ),
    )  # fmt: skip


def tiny_proposal_config() -> ModelConfig:
    """TransFusionHead on a map of more columns than rows, after a single block."""
    small = tiny_config()
    (stage,) = small.backbone_3d.stages
    return dataclasses.replace(
        small,
        name="tiny_proposals",
        point_cloud_range=(-8.32, -5.12, -2.0, 8.32, 5.12, 4.0),
        backbone_3d=dataclasses.replace(small.backbone_3d, stages=(dataclasses.replace(stage, num_blocks=1),)),
        backbone_2d=Backbone2dConfig(
            blocks=(1, 2), strides=(1, 2), channels=(8, 16), upsample_strides=(0.5, 1), upsample_channels=(8, 8)
        ),
        head=TransFusionHeadConfig(
            channels=16, ffn_channels=32, num_heads=2, num_proposals=20, small_classes=("pedestrian",)
        ),
    )  # fmt: skip


TINY_CONFIGS = {"tiny": tiny_config, "tiny_voxel": tiny_voxel_config, "tiny_proposals": tiny_proposal_config}


def tiny_network(seed: int = 0, name: str = "tiny") -> DSVT:
    """Random weights; see `randomize`."""
    torch.manual_seed(seed)
    return randomize(DSVT(TINY_CONFIGS[name]()))


def randomize(network: DSVT) -> DSVT:
    """Batch norms that change something, and biases such that boxes come out."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
        for group in getattr(network.dense_head, "heads_list", ()):
            group.hm[1].bias.fill_(-0.5)
    return network.eval().requires_grad_(False)


def write_tiny_model(folder: Path, seed: int = 0, name: str = "tiny") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    network = tiny_network(seed, name)
    plain = yaml.safe_load(yaml.safe_dump(_lists(dataclasses.asdict(network.config))))
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": plain}))
    state = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    save_file(state, folder / "weights.safetensors")
    return folder


def tiny_points(count: int = 600, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform([-5, -5, -0.5, 0], [5, 5, 2, 1], (count, 4)).astype(np.float32)


def _lists(value):
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_lists(entry) for entry in value]
    return value
