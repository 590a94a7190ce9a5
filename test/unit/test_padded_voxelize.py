"""Voxels of fixed capacity against those of any size, point by point."""

import torch
from fused_fixtures import DEVICE
from voxel_cases import (
    COUNTS,
    EXACT,
    LENGTHS,
    MODELS,
    ROOMS,
    ROOMS_OF_TWO,
    VOXELS,
    at_borders,
    inputs_of,
    missing_returns,
    scattered,
    several_clouds,
    turned,
    two_clouds,
    with_scaled_columns,
)

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import PreprocessConfig
from dsvt_ros.padded.voxelize import PaddedVoxelizer
from dsvt_ros.preprocess import is_return, scale_features
from dsvt_ros.voxelization import voxelize


def run(model, clouds, poses=None, *, room=1200, rows=900, config=EXACT):
    return PaddedVoxelizer(model, DEVICE, rows, room, len(clouds))(*inputs_of(clouds, rows, poses), config)


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
@COUNTS
def test_same_as_torch(model, count):
    points = scattered(model, count)
    found, expected = run(model, [points]), voxelize(points, model)
    assert_equal(found, expected, model)
    assert found.num_points.tolist() == [len(expected.points)]
    assert found.num_dropped.tolist() == [0]


@MODELS
def test_points_at_the_borders_of_cells(model):
    points = at_borders(model)
    assert_equal(run(model, [points], rows=2000), voxelize(points, model), model)


def test_missing_returns():
    model, config, points, expected = missing_returns()
    assert_equal(run(model, [points], config=config), expected, model)


def test_features_are_scaled():
    model, points = with_scaled_columns()
    for config in (PreprocessConfig(intensity_scale=1 / 255), EXACT):
        found = run(model, [points], config=config)
        assert_equal(found, voxelize(scale_features(points, model, config), model), model)


def test_pose():
    """Voxels of points as they are moved, of returns that are near or not as seen from the sensor."""
    pose, config, points, moved = turned()
    found = run(VOXELS, [points], [pose], config=config)
    expected = voxelize(moved[is_return(points, config)], VOXELS)
    order = torch.sort(expected.voxel_of_point, stable=True)[1]
    count = len(expected.points)
    assert found.num_points.tolist() == [count]
    torch.testing.assert_close(found.points[:count], expected.points[order], rtol=0, atol=1e-6)


@MODELS
@ROOMS
def test_the_farthest_voxels_are_dropped(model, room):
    """Many columns are as far as others, and a column of voxels may be cut."""
    points = scattered(model, 500)
    everything = voxelize(points, model)
    found = run(model, [points], room=room)
    assert_equal(found, keep_nearest(everything, model, room), model)
    assert found.num_points.tolist() == [len(everything.points)]
    assert found.num_dropped.tolist() == [len(everything) - room]


@LENGTHS
def test_several_clouds(lengths):
    clouds, poses, expected = several_clouds(lengths)
    assert_equal(run(VOXELS, clouds, poses), expected, VOXELS)


@MODELS
@ROOMS_OF_TWO
def test_clouds_share_the_room(model, room):
    """The nearest voxels of all clouds are kept; of equals those of the first cloud, then by cell."""
    clouds, everything = two_clouds(model)
    assert_equal(run(model, clouds, room=room), keep_nearest(everything, model, room), model)
