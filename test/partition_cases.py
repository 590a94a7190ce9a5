"""Models and voxels for stages that make windows and sets of fixed capacity, and the sets that torch makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ragged_sets import grid_from_coords, partition_from_fused

from dsvt_ros.capacity import capacity_for
from dsvt_ros.config import Backbone3dConfig, ModelConfig, StageConfig
from dsvt_ros.fused.structures import FusedStage
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import SetPartition

OFFSETS = ((0, 0, 0), (4, 4, 0))
FLAT, TALL = (20, 14, 1), (20, 14, 7)
FLAT_STAGES = (StageConfig(2, 7, windows=((8, 8, 1), (12, 12, 1)), offsets=OFFSETS),)
TALL_STAGES = (
    # The second shift has several windows above each other, and the first of them begins below the grid.
    StageConfig(2, 9, windows=((10, 7, 7), (12, 12, 3)), offsets=((0, 0, 0), (4, 4, 2)), pool_z=4),
    StageConfig(1, 5, windows=((10, 7, 2), (12, 12, 2)), offsets=OFFSETS, pool_z=2),  # the first shift only
    StageConfig(1, 36, windows=((10, 7, 1), (12, 12, 1)), offsets=OFFSETS),  # the second one only
)


def model_of(size, stages) -> ModelConfig:
    return dataclasses.replace(
        open_model("demo").model,
        point_cloud_range=(0.0, 0.0, 0.0, *map(float, size)),
        voxel_size=(1.0, 1.0, 1.0),
        backbone_3d=Backbone3dConfig(64, 16, 2, stages),
    )


def flat(**changes) -> ModelConfig:
    return model_of(FLAT, tuple(dataclasses.replace(stage, **changes) for stage in FLAT_STAGES))


FLAT_MODEL, TALL_MODEL = flat(), model_of(TALL, TALL_STAGES)
OUTSIDE_MODEL = flat(windows=((8, 8, 1), (30, 40, 1)), offsets=((9, 17, 0), (0, 25, 0)))
"""With offsets of more than a window, and windows larger than the grid."""

MODELS = pytest.mark.parametrize("model", [FLAT_MODEL, TALL_MODEL], ids=["pillars", "voxels"])


# -------------------------------------------------------------------------------------------------------------- voxels


def voxels_at(cells, size) -> torch.Tensor:
    """Coordinates of the voxels in the cells with these numbers."""
    nx, ny, nz = size
    cell = np.sort(np.asarray(cells, dtype=np.int64))
    coords = np.stack([cell // (nx * ny * nz), cell % nz, cell // nz % ny, cell // (nz * ny) % nx], 1)
    return torch.as_tensor(coords.astype(np.int32))


def scattered(count: int, size, clouds: int = 1, seed: int = 0) -> torch.Tensor:
    return voxels_at(np.random.default_rng(seed).choice(clouds * int(np.prod(size)), count, replace=False), size)


FLAT_CELLS = {
    "none": [],
    "the first one": [0],
    "the last one": [20 * 14 - 1],
    "the border": [x * 14 + y for x in range(20) for y in range(14) if x in (0, 19) or y in (0, 13)],
    "one window": [x * 14 + y for x in range(8) for y in range(8)],
    "one window of two sets": range(8),
    "all": range(20 * 14),
}
PILLARS = pytest.mark.parametrize("cells", FLAT_CELLS.values(), ids=FLAT_CELLS)
RANDOM_PILLARS = pytest.mark.parametrize(
    ("count", "set_size", "clouds"), [(90, 36, 1), (70, 1, 1), (160, 5, 2), (2, 48, 3)]
)

_TALL_CELLS = 20 * 14 * 7
VOXELS = pytest.mark.parametrize(
    ("coords", "clouds", "room"),
    [
        pytest.param(voxels_at([], TALL), 1, 9, id="none"),
        pytest.param(voxels_at([_TALL_CELLS - 1], TALL), 1, 1, id="the last one"),
        pytest.param(voxels_at(range(70, 84), TALL), 1, 20, id="two full columns"),
        pytest.param(voxels_at(range(_TALL_CELLS), TALL), 1, _TALL_CELLS, id="all"),
        pytest.param(scattered(300, TALL), 1, 2 * _TALL_CELLS, id="more room than cells"),
        pytest.param(scattered(250, TALL, 2), 2, 260, id="two clouds"),
        pytest.param(scattered(60, TALL, 1, 5) + torch.tensor([1, 0, 0, 0]).int(), 2, 60, id="one is empty"),
    ],
)


# ---------------------------------------------------------------------------------------------------- what is expected


def leaves(described) -> list:
    """What nested dataclasses and tuples hold."""
    if dataclasses.is_dataclass(described):
        described = tuple(getattr(described, part.name) for part in dataclasses.fields(described))
    return [leaf for part in described for leaf in leaves(part)] if isinstance(described, tuple) else [described]


def assert_same_sets(
    stages: tuple[FusedStage, ...], coords: torch.Tensor, model: ModelConfig, clouds: int = 1
) -> SetPartition:
    """The same sets as from torch, with the same slots, in tensors of the announced size; gives torch's."""
    expected = partition_sets(coords, model, clouds)
    for ours, theirs in zip(leaves(partition_from_fused(stages, model)), leaves(expected), strict=True):
        assert ours is theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))
    room = len(stages[0].grid.cell_of_voxel)
    for stage, size, capacity in zip(stages, model.stage_grids, capacity_for(model, room, clouds).stages, strict=True):
        assert stage.grid.size == size
        assert len(stage.grid.cell_of_voxel) == capacity.voxels
        count = int(stage.grid.num_voxels)
        inverse = torch.full((clouds * int(np.prod(size)),), -1, dtype=torch.int32)
        inverse[stage.grid.cell_of_voxel[:count].long().cpu()] = torch.arange(count, dtype=torch.int32)
        assert torch.equal(stage.grid.voxel_of_cell.cpu(), inverse)
        for own, most in zip(stage.sets, capacity.sets, strict=True):
            if own is not None:
                assert own.order.shape == (2, capacity.voxels)
                assert own.set_start.shape == (most + 1,)
        assert all(leaf.dtype == torch.int32 for leaf in leaves(stage) if isinstance(leaf, torch.Tensor))
    return expected


def check_graph(run, model: ModelConfig, assert_same) -> None:
    """One capture of a stage with room for 280 voxels serves clouds of any size."""
    size = model.grid_size
    grid = grid_from_coords(scattered(10, size), size, 1, 280)
    run(grid)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stages = run(grid)
    for count in (280, 0, 33):
        coords = scattered(count, size, seed=count)
        other = grid_from_coords(coords, size, 1, 280)
        for name in ("voxel_of_cell", "cell_of_voxel", "num_voxels"):
            getattr(grid, name).copy_(getattr(other, name))
        graph.replay()
        assert_same(stages, coords, model)
