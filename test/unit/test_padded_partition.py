"""Windows and sets of fixed capacity against those of any size."""

import dataclasses

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from ragged_sets import grid_from_coords, partition_from_fused

from dsvt_ros.capacity import capacity_for
from dsvt_ros.config import Backbone3dConfig, StageConfig
from dsvt_ros.fused.structures import Grid
from dsvt_ros.model.folder import open_model
from dsvt_ros.padded.partition import PaddedPartition
from dsvt_ros.set_partition import partition_sets

OFFSETS = ((0, 0, 0), (4, 4, 0))
FLAT, TALL = (20, 14, 1), (20, 14, 7)
FLAT_STAGES = (StageConfig(2, 7, windows=((8, 8, 1), (12, 12, 1)), offsets=OFFSETS),)
TALL_STAGES = (
    # The second shift has several windows above each other, and the first of them begins below the grid.
    StageConfig(2, 9, windows=((10, 7, 7), (12, 12, 3)), offsets=((0, 0, 0), (4, 4, 2)), pool_z=4),
    StageConfig(1, 5, windows=((10, 7, 2), (12, 12, 2)), offsets=OFFSETS, pool_z=2),  # the first shift only
    StageConfig(1, 36, windows=((10, 7, 1), (12, 12, 1)), offsets=OFFSETS),  # the second one only
)


def model_of(size, stages):
    return dataclasses.replace(
        open_model("demo").model,
        point_cloud_range=(0.0, 0.0, 0.0, *map(float, size)),
        voxel_size=(1.0, 1.0, 1.0),
        backbone_3d=Backbone3dConfig(64, 16, 2, stages),
    )


FLAT_MODEL, TALL_MODEL = model_of(FLAT, FLAT_STAGES), model_of(TALL, TALL_STAGES)


def voxels_at(cells, size):
    """Coordinates of the voxels in the cells with these numbers."""
    nx, ny, nz = size
    cell = np.sort(np.asarray(cells, dtype=np.int64))
    coords = np.stack([cell // (nx * ny * nz), cell % nz, cell // nz % ny, cell // (nz * ny) % nx], 1)
    return torch.as_tensor(coords.astype(np.int32))


def scattered(count, size, clouds=1, seed=0):
    return voxels_at(np.random.default_rng(seed).choice(clouds * int(np.prod(size)), count, replace=False), size)


def grid_of(coords, model, clouds, room):
    grid = grid_from_coords(coords, model.grid_size, clouds, room)
    return Grid(grid.size, *(part.to(DEVICE) for part in (grid.voxel_of_cell, grid.cell_of_voxel, grid.num_voxels)))


def leaves(described):
    """What nested dataclasses and tuples hold."""
    if dataclasses.is_dataclass(described):
        described = tuple(getattr(described, part.name) for part in dataclasses.fields(described))
    return [leaf for part in described for leaf in leaves(part)] if isinstance(described, tuple) else [described]


def assert_same(stages, coords, model, clouds=1):
    """The same sets, with the same slots, and nobody in what is left of the capacity."""
    expected = partition_sets(coords, model, clouds)
    for ours, theirs in zip(leaves(partition_from_fused(stages, model)), leaves(expected), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    room = len(stages[0].grid.cell_of_voxel)
    for stage, size, capacity in zip(
        stages, model.stage_grids, capacity_for(model, room, clouds).stages, strict=True
    ):
        count = int(stage.grid.num_voxels)
        assert stage.grid.size == size
        assert len(stage.grid.cell_of_voxel) == capacity.voxels
        inverse = torch.full((clouds * int(np.prod(size)),), -1, dtype=torch.int32, device=DEVICE)
        inverse[stage.grid.cell_of_voxel[:count].long()] = torch.arange(count, dtype=torch.int32, device=DEVICE)
        assert torch.equal(stage.grid.voxel_of_cell, inverse)
        every_row = torch.arange(capacity.voxels, device=DEVICE)
        for own, most in zip(stage.sets, capacity.sets, strict=True):
            if own is not None:
                assert own.set_start.shape == (most + 1,)
                assert (own.set_start[int(own.num_sets) :] == count).all()
                for order in own.order.long():
                    assert torch.equal(order.sort().values, every_row)
                    assert torch.equal(order[count:], every_row[count:])
        if stage.pooled is not None:
            assert (stage.pooled < count).all()
        assert all(leaf.dtype == torch.int32 for leaf in leaves(stage) if isinstance(leaf, torch.Tensor))


def check(coords, model, clouds=1, room=None):
    room = max(1, len(coords)) if room is None else room
    run = PaddedPartition(model, DEVICE, room, clouds)
    assert_same(run(grid_of(coords, model, clouds, room)), coords, model, clouds)


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param([], id="none"),
        pytest.param([0], id="the first one"),
        pytest.param([20 * 14 - 1], id="the last one"),
        pytest.param([x * 14 + y for x in range(8) for y in range(8)], id="one window"),
        pytest.param(range(20 * 14), id="all"),
    ],
)
@pytest.mark.parametrize("more", [0, 60])
def test_pillars(cells, more):
    check(voxels_at(cells, FLAT), FLAT_MODEL, room=max(1, len(cells)) + more)


@pytest.mark.parametrize(("count", "set_size", "clouds"), [(90, 36, 1), (70, 1, 1), (160, 5, 2), (2, 48, 3)])
def test_random_pillars(count, set_size, clouds):
    stages = (dataclasses.replace(FLAT_STAGES[0], set_size=set_size),)
    check(scattered(count, FLAT, clouds, seed=set_size), model_of(FLAT, stages), clouds, count + 50)


def test_windows_that_lie_outside_the_grid():
    """Offsets of more than a window, and windows larger than the grid."""
    stage = dataclasses.replace(FLAT_STAGES[0], windows=((8, 8, 1), (30, 40, 1)), offsets=((9, 17, 0), (0, 25, 0)))
    check(scattered(100, FLAT), model_of(FLAT, (stage,)))


TALL_CELLS = 20 * 14 * 7


@pytest.mark.parametrize(
    ("coords", "clouds", "room"),
    [
        pytest.param(voxels_at([], TALL), 1, 9, id="none"),
        pytest.param(voxels_at([TALL_CELLS - 1], TALL), 1, 1, id="the last one"),
        pytest.param(voxels_at(range(70, 84), TALL), 1, 20, id="two full columns"),
        pytest.param(voxels_at(range(TALL_CELLS), TALL), 1, TALL_CELLS, id="all"),
        pytest.param(scattered(300, TALL), 1, 2 * TALL_CELLS, id="more room than cells"),
        pytest.param(scattered(250, TALL, 2), 2, 260, id="two clouds"),
        pytest.param(scattered(60, TALL, 1, 5) + torch.tensor([1, 0, 0, 0]).int(), 2, 60, id="one is empty"),
    ],
)
def test_voxels(coords, clouds, room):
    check(coords, TALL_MODEL, clouds, room)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("model", [FLAT_MODEL, TALL_MODEL], ids=["pillars", "voxels"])
def test_cuda_graph(model):
    """One capture serves clouds of any size."""
    grid = grid_of(scattered(10, model.grid_size), model, 1, 280)
    run = PaddedPartition(model, DEVICE, 280)
    run(grid)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stages = run(grid)
    for count in (280, 0, 33):
        coords = scattered(count, model.grid_size, seed=count)
        other = grid_of(coords, model, 1, 280)
        for name in ("voxel_of_cell", "cell_of_voxel", "num_voxels"):
            getattr(grid, name).copy_(getattr(other, name))
        graph.replay()
        assert_same(stages, coords, model)
