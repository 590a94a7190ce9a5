"""Voxels of fixed capacity against those of any size, point by point."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import tiny_config, tiny_voxel_config

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import PointFeature, PreprocessConfig
from dsvt_ros.padded.voxelize import PaddedVoxelizer
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import drop_missing, is_return, scale_features, transform
from dsvt_ros.voxelization import voxelize

EXACT = PreprocessConfig(scale_features=False)
"""Leaves the values of points as they are."""


def small(model, cells):
    """`model` over `cells` by `cells` columns around the origin."""
    x, y, _ = (size * cells / 2 for size in model.voxel_size)
    z = model.point_cloud_range
    return dataclasses.replace(model, point_cloud_range=(-x, -y, z[2], x, y, z[5]))


PILLARS, VOXELS = small(tiny_config(), 16), small(tiny_voxel_config(), 12)
MODELS = pytest.mark.parametrize("model", [PILLARS, VOXELS], ids=["pillars", "voxels"])


def cloud(rows):
    return torch.as_tensor(np.asarray(rows, np.float32), device=DEVICE)


def scattered(model, count, seed=0):
    """Points in and around the range."""
    rng = np.random.default_rng(seed)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low - 0.5, high + 0.5, (count, 3))
    return cloud(np.column_stack([xyz, rng.uniform(0, 1, (count, len(model.features) - 3))]))


def run(model, clouds, poses=None, *, room=1200, rows=900, config=EXACT):
    """Voxels of clouds in a tensor with garbage behind them."""
    poses = [np.eye(4)] * len(clouds) if poses is None else poses
    points = torch.cat(clouds)
    points = torch.cat([points, points.new_full((rows - len(points), points.shape[1]), 0.5)])
    ends = torch.tensor([len(each) for each in clouds], device=DEVICE).cumsum(0).int()
    moves = torch.as_tensor(np.stack(poses)[:, :3], dtype=torch.float32, device=DEVICE)
    return PaddedVoxelizer(model, DEVICE, rows, room, len(clouds))(points, ends, moves, config)


def assert_equal(found, expected, model):
    """`expected` holds the same points, those in no voxel left out."""
    nx, ny, nz = model.grid_size
    batch, z, y, x = expected.coords.long().unbind(1)
    cell = ((batch * nx + x) * ny + y) * nz + z
    count, room = len(expected), len(found.grid.cell_of_voxel)
    assert found.grid.size == model.grid_size
    assert found.grid.num_voxels.tolist() == [count]
    assert torch.equal(found.grid.cell_of_voxel[:count].long(), cell)
    assert (found.grid.cell_of_voxel[count:] == 0).all()
    voxel_of_cell = torch.full_like(found.grid.voxel_of_cell, -1)
    voxel_of_cell[cell] = torch.arange(count, dtype=torch.int32, device=DEVICE)
    assert torch.equal(found.grid.voxel_of_cell, voxel_of_cell)
    voxel, order = torch.sort(expected.voxel_of_point, stable=True)
    assert torch.equal(found.points[: len(voxel)], expected.points[order])
    assert torch.equal(found.voxel_of_point[: len(voxel)], voxel)
    assert (found.voxel_of_point[len(voxel) :] == room).all()
    assert torch.equal(found.start.diff(), torch.bincount(voxel, minlength=room))


@MODELS
@pytest.mark.parametrize("count", [0, 1, 300, 700])
def test_same_as_torch(model, count):
    points = scattered(model, count)
    found, expected = run(model, [points]), voxelize(points, model)
    assert_equal(found, expected, model)
    assert found.num_points.tolist() == [len(expected.points)]
    assert found.num_dropped.tolist() == [0]


@MODELS
def test_points_at_the_borders_of_cells(model):
    """The nearest float32 numbers on both sides of every border, also of the range."""
    borders = [
        np.float32(model.point_cloud_range[axis]) + np.float32(size) * np.arange(-1, cells + 2, dtype=np.float32)
        for axis, (size, cells) in enumerate(zip(model.voxel_size, model.grid_size, strict=True))
    ]
    near = [np.concatenate([np.nextafter(b, b - 1), b, np.nextafter(b, b + 1)]) for b in borders]
    rng = np.random.default_rng(0)
    points = cloud(np.column_stack([rng.choice(values, 2000) for values in near] + [np.zeros(2000)]))
    points = points[is_return(points, EXACT)]
    expected = voxelize(points, model)
    assert 0 < len(expected.points) < len(points)
    assert_equal(run(model, [points], rows=2000), expected, model)


def test_missing_returns():
    nan, inf = math.nan, math.inf
    points = cloud([
        [nan, 1, 1, 0], [1, nan, 1, 0], [1, 1, nan, 0], [inf, 1, 1, 0], [1, -inf, 1, 0], [0, 0, 0, 0], [3e38, 1, 1, 0],
        [0.5, 0, 0, 1], [0.25, 0, 0, 1], [1, 1, 1, nan], [1, 1, 1, inf], [1, 1, 1, -inf], [-1, 1, 1, 2],
    ])  # fmt: skip
    model = dataclasses.replace(PILLARS, features=(*PILLARS.features[:3], PointFeature("intensity", fill=0.25)))
    config = dataclasses.replace(EXACT, min_range=0.5)
    expected = voxelize(drop_missing(points, model, config), model)
    assert len(expected.points) == 5
    assert_equal(run(model, [points], config=config), expected, model)


def test_features_are_scaled():
    features = (*PILLARS.features[:3], PointFeature("intensity", "tanh"), PointFeature("elongation", "tanh"))
    model = dataclasses.replace(PILLARS, features=(*features, PointFeature("time")))
    points = scattered(model, 200)
    points[:, 3] *= 255
    for config in (PreprocessConfig(intensity_scale=1 / 255), EXACT):
        found = run(model, [points], config=config)
        assert_equal(found, voxelize(scale_features(points, model, config), model), model)


def test_pose():
    """Voxels of points as they are moved, of returns that are near or not as seen from the sensor."""
    pose = pose_matrix((0.3, -0.4, 0.5, 0.1, -0.2, 2.0))
    points = scattered(VOXELS, 300)
    points[0, :3] = 0.05
    config = dataclasses.replace(EXACT, min_range=1.0)
    found = run(VOXELS, [points], [pose], config=config)
    moved = transform(points, torch.as_tensor(pose, dtype=torch.float32, device=DEVICE))
    expected = voxelize(moved[is_return(points, config)], VOXELS)
    order = torch.sort(expected.voxel_of_point, stable=True)[1]
    count = len(expected.points)
    assert found.num_points.tolist() == [count]
    torch.testing.assert_close(found.points[:count], expected.points[order], rtol=0, atol=1e-6)


@MODELS
@pytest.mark.parametrize("room", [1, 2, 57, 99, 100, 101, 144])
def test_the_farthest_voxels_are_dropped(model, room):
    """Many columns are as far as others, and a column of voxels may be cut."""
    points = scattered(model, 500)
    everything = voxelize(points, model)
    found = run(model, [points], room=room)
    assert_equal(found, keep_nearest(everything, model, room), model)
    assert found.num_points.tolist() == [len(everything.points)]
    assert found.num_dropped.tolist() == [len(everything) - room]


@pytest.mark.parametrize("lengths", [(200, 0, 150), (0, 0, 5), (1, 200, 1), (0, 0, 0)])
def test_several_clouds(lengths):
    poses = [pose_matrix(pose) for pose in ((), (0.25, 0, 0, 0, 0, 0), (0, -0.5, 0.25, 0, 0, 0))]
    clouds = [scattered(VOXELS, length, seed) for seed, length in enumerate(lengths)]
    batch = torch.arange(3, device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))
    points = torch.cat(clouds)
    shift = torch.as_tensor(np.stack(poses)[:, :3, 3], dtype=torch.float32, device=DEVICE)[batch]
    moved = torch.cat([points[:, :3] + shift, points[:, 3:]], 1)
    returned = is_return(points, EXACT)
    expected = voxelize(moved[returned], VOXELS, batch[returned])
    assert_equal(run(VOXELS, clouds, poses), expected, VOXELS)


@MODELS
@pytest.mark.parametrize("room", [1, 150, 201])
def test_clouds_share_the_room(model, room):
    """The nearest voxels of all clouds are kept; of equals those of the first cloud, then by cell."""
    clouds = [scattered(model, 300, seed) for seed in range(2)]
    batch = torch.arange(2, device=DEVICE).repeat_interleave(300)
    everything = voxelize(torch.cat(clouds), model, batch)
    assert_equal(run(model, clouds, room=room), keep_nearest(everything, model, room), model)
