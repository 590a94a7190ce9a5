"""Voxels made by kernels against the torch code, point by point and bit by bit."""

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import tiny_voxel_config
from voxel_cases import (
    COUNTS,
    EXACT,
    LENGTHS,
    MODELS,
    PILLARS,
    ROOMS,
    ROOMS_OF_TWO,
    VOXELS,
    at_borders,
    cloud,
    inputs_of,
    missing_returns,
    scattered,
    several_clouds,
    small,
    turned,
    two_clouds,
    with_scaled_columns,
)

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import PreprocessConfig
from dsvt_ros.fused.structures import OFFSET_SCALE, SEGMENT_POINTS
from dsvt_ros.fused.voxelize import Voxelizer
from dsvt_ros.preprocess import is_return, scale_features
from dsvt_ros.voxelization import voxelize

_interpreter = interpreted("voxelization")
pytestmark = needs_triton


def run(model, *clouds, poses=None, room=400, rows=None, config=EXACT):
    """With room for no more points than there are unless `rows` says so."""
    rows = sum(map(len, clouds)) if rows is None else rows
    return Voxelizer(model, DEVICE, rows, room, len(clouds))(*inputs_of(clouds, rows, poses), config)


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
@COUNTS
def test_same_as_torch(model, count):
    points = scattered(model, count)
    found = run(model, points, room=1200, rows=700)
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
    found = run(PILLARS, points, room=1)
    assert found.segments.num_segments.item() == -(-count // SEGMENT_POINTS)
    assert_equal(found, voxelize(points, PILLARS), PILLARS)


@MODELS
def test_points_at_the_borders_of_cells(model):
    points = at_borders(model)
    assert_equal(run(model, points, room=1200), voxelize(points, model), model)


def test_values_beyond_any_range():
    far = [[value, 0.1, 0.1, 0] for value in (1e9, -1e9, 1e30, -1e30, 3e38)]
    points = cloud([*far, [0.1, 0.1, 0.1, 1]])
    found = run(PILLARS, points)
    assert (found.num_points.item(), found.grid.num_voxels.item()) == (1, 1)
    assert_equal(found, voxelize(points, PILLARS), PILLARS)


# ---------------------------------------------------------------------------------------------------- preprocessing


def test_missing_returns():
    model, config, points, expected = missing_returns()
    assert_equal(run(model, points, config=config), expected, model)


def test_features_are_scaled():
    model, points = with_scaled_columns()
    for config in (PreprocessConfig(intensity_scale=1 / 255), PreprocessConfig(), EXACT):
        found = run(model, points, config=config)
        inside = voxel_of_point(found) >= 0
        expected = scale_features(points, model, config)[inside]
        torch.testing.assert_close(found.points[inside], expected, rtol=0, atol=5e-7)
        assert torch.equal(found.points[inside][:, 5], points[inside][:, 5])


def test_pose():
    """Points as torch moves them, up to rounding, and voxels of the points as moved; nearness is that to the sensor."""
    pose, config, points, moved = turned()
    found = run(VOXELS, points, poses=[pose], room=1200, config=config)
    inside = voxel_of_point(found) >= 0
    torch.testing.assert_close(found.points[inside], moved[inside], rtol=0, atol=1e-6)
    exact = torch.where(inside[:, None], found.points, moved)
    assert_equal(found, voxelize(exact[is_return(points, config)], VOXELS), VOXELS)


# ---------------------------------------------------------------------------------------------------------- too many


@MODELS
@ROOMS
def test_the_farthest_voxels_are_dropped(model, room):
    """Many columns are as far as others, and a column of voxels may be cut."""
    points = scattered(model, 500)
    everything = voxelize(points, model)
    assert len(everything) > 144
    found = run(model, points, room=room, rows=600)
    assert_equal(found, keep_nearest(everything, model, room), model)
    assert found.num_points.item() == len(everything.points)
    assert found.num_dropped.item() == len(everything) - room


def test_as_many_as_there_is_room_for():
    points = scattered(PILLARS, 300)
    expected = voxelize(points, PILLARS)
    found = run(PILLARS, points, room=len(expected))
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
    assert_equal(run(model, points, room=room), keep_nearest(everything, model, room), model)


# ------------------------------------------------------------------------------------------------------ several clouds


@LENGTHS
def test_several_clouds(lengths):
    clouds, poses, expected = several_clouds(lengths)
    assert_equal(run(VOXELS, *clouds, poses=poses, room=900, rows=400), expected, VOXELS)


@MODELS
@ROOMS_OF_TWO
def test_clouds_share_the_room(model, room):
    """The nearest voxels of all clouds are kept; of equals those of the first cloud, then by cell."""
    clouds, everything = two_clouds(model)
    assert_equal(run(model, *clouds, room=room), keep_nearest(everything, model, room), model)


# -------------------------------------------------------------------------------------------------- one after another


def test_calls_leave_nothing_behind():
    """The same bytes again, whatever came in between: also a cloud with dropped voxels."""
    make = Voxelizer(VOXELS, DEVICE, 600, 200)
    clouds = [scattered(VOXELS, count, seed) for seed, count in enumerate((300, 600, 0, 300))]
    runs = []
    for points in (*clouds, *clouds):
        found = make(*inputs_of([points], 600), EXACT)
        assert_equal(found, keep_nearest(voxelize(points, VOXELS), VOXELS, 200), VOXELS)
        count = found.grid.num_voxels.item()
        runs.append([found.grid.voxel_of_cell, found.segments.offset_sum[:count], found.num_points, found.num_dropped])
    for first, again in zip(runs[:4], runs[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
