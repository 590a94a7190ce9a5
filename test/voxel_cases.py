"""Clouds for stages that make voxels of fixed capacity, and the voxels that torch makes of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import tiny_config, tiny_voxel_config

from dsvt_ros.config import ModelConfig, PointFeature, PreprocessConfig
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import drop_missing, is_return, transform
from dsvt_ros.structures import Voxels
from dsvt_ros.voxelization import voxelize

EXACT = PreprocessConfig(scale_features=False)
"""Leaves the values of points as they are."""


def small(model: ModelConfig, cells: int) -> ModelConfig:
    """`model` over `cells` by `cells` columns around the origin."""
    x, y, _ = (size * cells / 2 for size in model.voxel_size)
    z = model.point_cloud_range
    return dataclasses.replace(model, point_cloud_range=(-x, -y, z[2], x, y, z[5]))


PILLARS, VOXELS = small(tiny_config(), 16), small(tiny_voxel_config(), 12)

MODELS = pytest.mark.parametrize("model", [PILLARS, VOXELS], ids=["pillars", "voxels"])
COUNTS = pytest.mark.parametrize("count", [0, 1, 300, 700])
ROOMS = pytest.mark.parametrize("room", [1, 2, 57, 99, 100, 101, 144])
ROOMS_OF_TWO = pytest.mark.parametrize("room", [1, 150, 201])
LENGTHS = pytest.mark.parametrize("lengths", [(200, 0, 150), (0, 0, 5), (1, 200, 1), (0, 0, 0)])


def cloud(rows) -> torch.Tensor:
    return torch.as_tensor(np.asarray(rows, np.float32), device=DEVICE)


def scattered(model: ModelConfig, count: int, seed: int = 0) -> torch.Tensor:
    """Points in and around the range."""
    rng = np.random.default_rng(seed)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low - 0.5, high + 0.5, (count, 3))
    return cloud(np.column_stack([xyz, rng.uniform(0, 1, (count, len(model.features) - 3))]))


def inputs_of(clouds, rows: int, poses=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a stage takes: points with garbage behind them, the end of each cloud, and how each one is moved."""
    poses = [np.eye(4)] * len(clouds) if poses is None else poses
    points = torch.cat(clouds)
    points = torch.cat([points, points.new_full((rows - len(points), points.shape[1]), 0.5)])
    ends = torch.tensor([len(each) for each in clouds], device=DEVICE).cumsum(0).int()
    return points, ends, torch.as_tensor(np.stack(poses)[:, :3], dtype=torch.float32, device=DEVICE).contiguous()


def at_borders(model: ModelConfig) -> torch.Tensor:
    """Points of the nearest float32 numbers on both sides of every border of cells, also of the range."""
    borders = [
        np.float32(model.point_cloud_range[axis]) + np.float32(size) * np.arange(-1, cells + 2, dtype=np.float32)
        for axis, (size, cells) in enumerate(zip(model.voxel_size, model.grid_size, strict=True))
    ]
    near = [np.concatenate([np.nextafter(b, b - 1), b, np.nextafter(b, b + 1)]) for b in borders]
    rng = np.random.default_rng(0)
    points = cloud(np.column_stack([rng.choice(values, 2000) for values in near] + [np.zeros(2000)]))
    points = points[is_return(points, EXACT)]
    assert 0 < len(voxelize(points, model).points) < len(points)
    return points


def missing_returns() -> tuple[ModelConfig, PreprocessConfig, torch.Tensor, Voxels]:
    """A model that fills in an intensity, options with a least range, points that are no numbers or near, voxels."""
    nan, inf = math.nan, math.inf
    points = cloud([
        [nan, 1, 1, 0], [1, nan, 1, 0], [1, 1, nan, 0], [inf, 1, 1, 0], [1, -inf, 1, 0], [0, 0, 0, 0], [3e38, 1, 1, 0],
        [0.5, 0, 0, 1], [0.25, 0, 0, 1], [1, 1, 1, nan], [1, 1, 1, inf], [1, 1, 1, -inf], [-1, 1, 1, 2],
    ])  # fmt: skip
    model = dataclasses.replace(PILLARS, features=(*PILLARS.features[:3], PointFeature("intensity", fill=0.25)))
    config = dataclasses.replace(EXACT, min_range=0.5)
    expected = voxelize(drop_missing(points, model, config), model)
    assert len(expected.points) == 5
    return model, config, points, expected


def with_scaled_columns() -> tuple[ModelConfig, torch.Tensor]:
    """A model that scales two columns and leaves a third, and points with raw intensities."""
    features = (*PILLARS.features[:3], PointFeature("intensity", "tanh"), PointFeature("elongation", "tanh"))
    model = dataclasses.replace(PILLARS, features=(*features, PointFeature("time")))
    points = scattered(model, 200)
    points[:, 3] *= 255
    points[:100, 4] -= 0.5
    points[0, 4], points[1, 4] = -500, 500
    return model, points


def turned() -> tuple[np.ndarray, PreprocessConfig, torch.Tensor, torch.Tensor]:
    """A pose, options with a least range from the sensor, points for `VOXELS`, and the points as torch moves them."""
    pose = pose_matrix((0.3, -0.4, 0.5, 0.1, -0.2, 2.0))
    points = scattered(VOXELS, 300)
    points[0, :3] = 0.05
    moved = transform(points, torch.as_tensor(pose, dtype=torch.float32, device=DEVICE))
    return pose, dataclasses.replace(EXACT, min_range=1.0), points, moved


def several_clouds(lengths) -> tuple[list[torch.Tensor], list[np.ndarray], Voxels]:
    """Three clouds for `VOXELS`, poses that only shift, by what float32 holds exactly, and the voxels."""
    poses = [pose_matrix(pose) for pose in ((), (0.25, 0, 0, 0, 0, 0), (0, -0.5, 0.25, 0, 0, 0))]
    clouds = [scattered(VOXELS, length, seed) for seed, length in enumerate(lengths)]
    batch = torch.arange(3, device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))
    points = torch.cat(clouds)
    shift = torch.as_tensor(np.stack(poses)[:, :3, 3], dtype=torch.float32, device=DEVICE)[batch]
    moved = torch.cat([points[:, :3] + shift, points[:, 3:]], 1)
    returned = is_return(points, EXACT)
    return clouds, poses, voxelize(moved[returned], VOXELS, batch[returned])


def two_clouds(model: ModelConfig) -> tuple[list[torch.Tensor], Voxels]:
    """And all their voxels."""
    clouds = [scattered(model, 300, seed) for seed in range(2)]
    batch = torch.arange(2, device=DEVICE).repeat_interleave(300)
    assert is_return(torch.cat(clouds), EXACT).all()
    return clouds, voxelize(torch.cat(clouds), model, batch)
