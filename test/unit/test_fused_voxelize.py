"""Voxels made by kernels against the torch code, point by point and bit by bit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import tiny_config, tiny_voxel_config

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import PointFeature, PreprocessConfig
from dsvt_ros.fused.structures import OFFSET_SCALE, SEGMENT_POINTS
from dsvt_ros.fused.voxelize import Voxelizer
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import drop_missing, is_return, scale_features, transform
from dsvt_ros.voxelization import voxelize

_interpreter = interpreted("voxelization")
pytestmark = needs_triton

EXACT = PreprocessConfig(scale_features=False)
"""Leaves the values of points as they are."""


def small(model, cells):
    """`model` over `cells` by `cells` columns around the origin."""
    x, y, _ = (size * cells / 2 for size in model.voxel_size)
    z = model.point_cloud_range
    return dataclasses.replace(model, point_cloud_range=(-x, -y, z[2], x, y, z[5]))


PILLARS, VOXELS = small(tiny_config(), 16), small(tiny_voxel_config(), 12)
MODELS = pytest.mark.parametrize("model", [PILLARS, VOXELS], ids=["pillars", "voxels"])


def scattered(model, count, seed=0):
    """Points in and around the range."""
    rng = np.random.default_rng(seed)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low - 0.5, high + 0.5, (count, 3))
    return cloud(np.column_stack([xyz, rng.uniform(0, 1, (count, len(model.features) - 3))]))


def cloud(rows):
    return torch.as_tensor(np.asarray(rows, np.float32), device=DEVICE)


def in_room(points, rows):
    """The points, and garbage behind them."""
    return torch.cat([points, points.new_full((rows - len(points), points.shape[1]), 0.5)])


def ends_of(*lengths):
    return torch.tensor(lengths, device=DEVICE).cumsum(0).int()


def poses_of(*poses):
    return torch.as_tensor(np.stack(poses)[:, :3], dtype=torch.float32, device=DEVICE).contiguous()


def run(model, points, voxels=400, config=EXACT, pose=None, rows=None):
    rows = len(points) if rows is None else rows
    make = Voxelizer(model, DEVICE, rows, voxels)
    return make(in_room(points, rows), ends_of(len(points)), poses_of(np.eye(4) if pose is None else pose), config)


def coords_of(found):
    """(V, 4) as `structures.Voxels` has them."""
    nx, ny, nz = found.grid.size
    cell = found.grid.cell_of_voxel[: found.grid.num_voxels.item()]
    return torch.stack([cell // (nx * ny * nz), cell % nz, cell // nz % ny, cell // (ny * nz) % nx], 1)


def voxel_of_point(found):
    """(N,) from the segments, which must be well formed; -1 for points in none."""
    segments, count = found.segments, found.segments.num_segments.item()
    voxel, slots = segments.voxel[:count].long(), segments.point[:count]
    num_voxels = found.grid.num_voxels.item()
    in_voxel = segments.points_in_voxel[:num_voxels]
    number = torch.arange(num_voxels, device=DEVICE)
    assert torch.equal(voxel, number.repeat_interleave((in_voxel + SEGMENT_POINTS - 1) // SEGMENT_POINTS))
    # Full segments, then one with its points in front.
    filled = (slots >= 0).sum(1)
    assert ((slots >= 0) == (torch.arange(SEGMENT_POINTS, device=DEVICE) < filled[:, None])).all()
    assert (filled[:-1][voxel[:-1] == voxel[1:]] == SEGMENT_POINTS).all()
    result = torch.full((len(found.points),), -1, device=DEVICE)
    points = slots[slots >= 0].long()
    assert len(points.unique()) == len(points)
    result[points] = voxel[:, None].expand_as(slots)[slots >= 0]
    assert torch.equal(torch.bincount(result[points], minlength=num_voxels), in_voxel.long())
    return result


def assert_equal(found, expected, model):
    """`expected` holds the same points, those in no voxel left out."""
    assert found.grid.num_voxels.item() == len(expected)
    assert torch.equal(coords_of(found), expected.coords)
    of_point = voxel_of_point(found)
    assert torch.equal(of_point[of_point >= 0], expected.voxel_of_point)
    assert torch.equal(found.points[of_point >= 0], expected.points)
    cells = found.grid.voxel_of_cell
    occupied = (cells >= 0).nonzero().squeeze(1)
    assert torch.equal(occupied.int(), found.grid.cell_of_voxel[: len(expected)])
    assert torch.equal(cells[occupied], torch.arange(len(expected), dtype=torch.int32, device=DEVICE))
    size, low = (torch.tensor(v, dtype=torch.float64) for v in (model.voxel_size, model.point_cloud_range[:3]))
    count = found.segments.points_in_voxel[: len(expected), None].cpu()
    offsets = found.segments.offset_sum[: len(expected)].cpu() / count / OFFSET_SCALE
    means = (expected.coords[:, [3, 2, 1]].cpu() + offsets) * size + low
    sums = torch.zeros(len(expected), 3, dtype=torch.float64)
    sums.index_add_(0, expected.voxel_of_point.cpu(), expected.points[:, :3].double().cpu())
    torch.testing.assert_close(means, sums / count, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- points to voxels


@MODELS
@pytest.mark.parametrize("count", [0, 1, 300, 700])
def test_same_as_torch(model, count):
    points = scattered(model, count)
    found = run(model, points, voxels=1200, rows=700)
    expected = voxelize(points, model)
    assert_equal(found, expected, model)
    assert found.num_points.item() == len(expected.points)
    assert found.num_dropped.item() == 0


def test_no_room_for_points():
    assert run(PILLARS, scattered(PILLARS, 0)).grid.num_voxels.item() == 0


@pytest.mark.parametrize("count", [7, 8, 9, 600])
def test_all_points_in_one_voxel(count):
    points = scattered(PILLARS, count)
    points[:, :2] = points[:, :2].remainder(0.3) + 0.01
    points[:, 2] = points[:, 2].clamp(-1.9, 3.9)
    found = run(PILLARS, points, voxels=1)
    assert found.segments.num_segments.item() == -(-count // SEGMENT_POINTS)
    assert_equal(found, voxelize(points, PILLARS), PILLARS)


@MODELS
def test_points_at_the_borders_of_cells(model):
    """The nearest float32 numbers on both sides of every border, also of the range."""
    borders = [
        np.float32(model.point_cloud_range[axis]) + np.float32(size) * np.arange(-1, cells + 2, dtype=np.float32)
        for axis, (size, cells) in enumerate(zip(model.voxel_size, model.grid_size, strict=True))
    ]
    near = [np.concatenate([np.nextafter(b, b - 1), b, np.nextafter(b, b + 1)]) for b in borders]
    rng = np.random.default_rng(0)
    xyz = np.column_stack([rng.choice(values, 2000) for values in near])
    points = cloud(np.column_stack([xyz, np.zeros(2000)]))
    points = points[is_return(points, EXACT)]
    expected = voxelize(points, model)
    assert 0 < len(expected.points) < len(points)
    assert_equal(run(model, points, voxels=1200), expected, model)


def test_values_beyond_any_range():
    far = [[value, 0.1, 0.1, 0] for value in (1e9, -1e9, 1e30, -1e30, 3e38)]
    points = cloud([*far, [0.1, 0.1, 0.1, 1]])
    found = run(PILLARS, points)
    assert (found.num_points.item(), found.grid.num_voxels.item()) == (1, 1)
    assert_equal(found, voxelize(points, PILLARS), PILLARS)


# ---------------------------------------------------------------------------------------------------- preprocessing


def test_missing_returns():
    nan, inf = math.nan, math.inf
    points = cloud([
        [nan, 1, 1, 0], [1, nan, 1, 0], [1, 1, nan, 0], [inf, 1, 1, 0], [1, -inf, 1, 0], [0, 0, 0, 0],
        [0.5, 0, 0, 1], [0.25, 0, 0, 1], [1, 1, 1, nan], [1, 1, 1, inf], [1, 1, 1, -inf], [-1, 1, 1, 2],
    ])  # fmt: skip
    model = dataclasses.replace(PILLARS, features=(*PILLARS.features[:3], PointFeature("intensity", fill=0.25)))
    config = dataclasses.replace(EXACT, min_range=0.5)
    found = run(model, points, config=config)
    expected = voxelize(drop_missing(points, model, config), model)
    assert len(expected.points) == 5
    assert_equal(found, expected, model)


def test_features_are_scaled():
    features = (*PILLARS.features[:3], PointFeature("intensity", "tanh"), PointFeature("elongation", "tanh"))
    model = dataclasses.replace(PILLARS, features=(*features, PointFeature("time")))
    points = scattered(model, 200)
    points[:, 3] *= 255
    points[:100, 4] -= 0.5
    points[0, 4], points[1, 4] = -500, 500
    for config in (PreprocessConfig(intensity_scale=1 / 255), PreprocessConfig(), EXACT):
        found = run(model, points, config=config)
        inside = voxel_of_point(found) >= 0
        expected = scale_features(points, model, config)[inside]
        torch.testing.assert_close(found.points[inside], expected, rtol=0, atol=5e-7)
        assert torch.equal(found.points[inside][:, 5], points[inside][:, 5])


def test_pose():
    """Points as torch moves them, up to rounding, and voxels of the points as moved; nearness is that to the sensor."""
    pose = pose_matrix((0.3, -0.4, 0.5, 0.1, -0.2, 2.0))
    points = scattered(VOXELS, 300)
    points[0, :3] = 0.05
    config = dataclasses.replace(EXACT, min_range=1.0)
    found = run(VOXELS, points, voxels=1200, pose=pose, config=config)
    moved = transform(points, torch.as_tensor(pose, dtype=torch.float32, device=DEVICE))
    inside = voxel_of_point(found) >= 0
    torch.testing.assert_close(found.points[inside], moved[inside], rtol=0, atol=1e-6)
    exact = torch.where(inside[:, None], found.points, moved)
    assert_equal(found, voxelize(exact[is_return(points, config)], VOXELS), VOXELS)


# ---------------------------------------------------------------------------------------------------------- too many


@MODELS
@pytest.mark.parametrize("room", [1, 2, 57, 99, 100, 101, 144])
def test_the_farthest_voxels_are_dropped(model, room):
    """Many columns are as far as others, and a column of voxels may be cut."""
    points = scattered(model, 500)
    everything = voxelize(points, model)
    assert len(everything) > 144
    found = run(model, points, voxels=room, rows=600)
    assert_equal(found, keep_nearest(everything, model, room), model)
    assert found.num_points.item() == len(everything.points)
    assert found.num_dropped.item() == len(everything) - room


def test_as_many_as_there_is_room_for():
    points = scattered(PILLARS, 300)
    expected = voxelize(points, PILLARS)
    found = run(PILLARS, points, voxels=len(expected))
    assert_equal(found, expected, PILLARS)
    assert found.num_dropped.item() == 0


@pytest.mark.parametrize("room", [699, 2000])
def test_blocks_of_cells_and_columns(room, monkeypatch):
    """More of them than are looked at together."""
    monkeypatch.setattr("dsvt_ros.fused.voxelize.PREFIX_STEP", 2)
    model = small(tiny_voxel_config(), 31)
    points = scattered(model, 1500)
    everything = voxelize(points, model)
    assert 700 < len(everything) < 2000
    assert_equal(run(model, points, voxels=room), keep_nearest(everything, model, room), model)


# ------------------------------------------------------------------------------------------------------ several clouds


@pytest.mark.parametrize("lengths", [(200, 0, 150), (0, 0, 5), (1, 200, 1), (0, 0, 0)])
def test_several_clouds(lengths):
    poses = [pose_matrix(pose) for pose in ((), (0.25, 0, 0, 0, 0, 0), (0, -0.5, 0.25, 0, 0, 0))]
    points = scattered(VOXELS, sum(lengths))
    found = Voxelizer(VOXELS, DEVICE, 400, 900, clouds=3)(
        in_room(points, 400), ends_of(*lengths), poses_of(*poses), EXACT
    )
    batch = torch.arange(3, device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))
    shift = torch.as_tensor(np.stack(poses)[:, :3, 3], dtype=torch.float32, device=DEVICE)[batch]
    moved = torch.cat([points[:, :3] + shift, points[:, 3:]], 1)
    returned = is_return(points, EXACT)
    assert_equal(found, voxelize(moved[returned], VOXELS, batch[returned]), VOXELS)


@MODELS
@pytest.mark.parametrize("room", [1, 150, 201])
def test_clouds_share_the_room(model, room):
    """The nearest voxels of all clouds are kept; of equals those of the first cloud, then by cell."""
    points = scattered(model, 600)
    batch = torch.arange(2, device=DEVICE).repeat_interleave(300)
    found = Voxelizer(model, DEVICE, 600, room, clouds=2)(
        points, ends_of(300, 300), poses_of(np.eye(4), np.eye(4)), EXACT
    )
    points = points[is_return(points, EXACT)]
    assert len(points) == 600
    assert_equal(found, keep_nearest(voxelize(points, model, batch), model, room), model)


# -------------------------------------------------------------------------------------------------- one after another


def test_calls_leave_nothing_behind():
    """The same bytes again, whatever came in between: also a cloud with dropped voxels."""
    make = Voxelizer(VOXELS, DEVICE, 600, 200)
    clouds = [scattered(VOXELS, count, seed) for seed, count in enumerate((300, 600, 0, 300))]
    runs = []
    for points in (*clouds, *clouds):
        found = make(in_room(points, 600), ends_of(len(points)), poses_of(np.eye(4)), EXACT)
        assert_equal(found, keep_nearest(voxelize(points, VOXELS), VOXELS, 200), VOXELS)
        count = found.grid.num_voxels.item()
        runs.append([found.grid.voxel_of_cell, found.segments.offset_sum[:count], found.num_points, found.num_dropped])
    for first, again in zip(runs[:4], runs[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
