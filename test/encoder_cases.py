"""Pillar encoders, clouds for them, and what they give in torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import randomize, tiny_config, tiny_voxel_config

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import EncoderConfig, ModelConfig, PointFeature
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.model.pillar_encoder import PillarEncoder
from dsvt_ros.voxelization import voxelize

COLUMNS = (PointFeature("intensity"), PointFeature("elongation"), PointFeature("time"))
GRIDS = pytest.mark.parametrize("config", [tiny_config, tiny_voxel_config], ids=["pillars", "voxels"])


def model_of(channels, columns: int = 4, config=tiny_config, shift_m: float = 0.0) -> ModelConfig:
    """A range that begins far from the origin if shifted."""
    small = config()
    moved = tuple(value + (shift_m if axis % 3 < 2 else 0.0) for axis, value in enumerate(small.point_cloud_range))
    return dataclasses.replace(
        small,
        point_cloud_range=moved,
        features=(*small.features[:3], *COLUMNS[: columns - 3]),
        encoder=EncoderConfig(channels=channels),
        backbone_3d=dataclasses.replace(small.backbone_3d, channels=channels[-1]),
    )


def encoder_of(model: ModelConfig) -> PillarEncoder:
    torch.manual_seed(0)
    return folded_copy(randomize(DSVT(model)).vfe.to(DEVICE))


def encoder_beyond_float16(model: ModelConfig) -> PillarEncoder:
    """With a weight of 1e5."""
    encoder = encoder_of(model)
    encoder.pfn_layers[1].linear.weight[0, 0] = 1e5
    return encoder


# -------------------------------------------------------------------------------------------------------------- clouds


def cloud(model: ModelConfig, count: int, seed: int = 0, dense: int = 0) -> torch.Tensor:
    """Points all over the range, and some in a few voxels near its centre."""
    rng = np.random.default_rng(seed)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low, high, (count, 3))
    xyz[:dense, :2] = (low + high)[:2] / 2 + rng.uniform(-0.3, 0.3, (dense, 2))
    rest = rng.uniform(0, 1, (count, len(model.features) - 3))
    return torch.as_tensor(np.column_stack([xyz, rest]).astype(np.float32), device=DEVICE)


def with_raw_intensities(points: torch.Tensor) -> torch.Tensor:
    """Whole numbers up to 255."""
    return torch.cat([points[:, :3], (255 * points[:, 3:4]).round(), points[:, 4:]], 1)


def in_one_pillar(points: torch.Tensor) -> torch.Tensor:
    """The points moved into the column of cells at the origin."""
    return torch.cat([points[:, :2].remainder(0.3) + 0.01, points[:, 2:]], 1)


# ---------------------------------------------------------------------------------------------------- what is expected


@torch.inference_mode()
def expected_features(encoder: PillarEncoder, model: ModelConfig, points: torch.Tensor, room: int) -> torch.Tensor:
    """(V, C) of the nearest voxels that there is room for."""
    return encoder(keep_nearest(voxelize(points, model), model, room))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Features of half precision, as a whole and of each voxel."""
    assert (found.shape, found.dtype) == (expected.shape, torch.float16)
    if len(found):
        errors = found.float() - expected
        assert (errors.norm() / expected.norm()).item() < 1e-3
        assert (errors.norm(dim=1) / expected.norm(dim=1).clamp(min=1e-2)).max().item() < 4e-3
