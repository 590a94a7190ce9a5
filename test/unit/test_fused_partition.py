"""Windows and sets from Triton's kernels against those of torch."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from ragged_sets import grid_from_coords, partition_from_fused

from dsvt_ros.capacity import capacity_for
from dsvt_ros.config import Backbone3dConfig, ModelConfig, StageConfig
from dsvt_ros.fused.partition import FusedPartition
from dsvt_ros.fused.structures import Grid
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets

_interpreter = interpreted("set_partition")

OFFSETS = ((0, 0, 0), (4, 4, 0))
FLAT = (20, 14, 1)
FLAT_STAGES = (StageConfig(2, 7, windows=((8, 8, 1), (12, 12, 1)), offsets=OFFSETS),)
TALL = (20, 14, 7)
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


def tall() -> ModelConfig:
    return model_of(TALL, TALL_STAGES)


def voxels_at(cells, size):
    """Coordinates of the voxels in the cells with these numbers."""
    nx, ny, nz = size
    cell = np.sort(np.asarray(cells, dtype=np.int64))
    coords = np.stack([cell // (nx * ny * nz), cell % nz, cell // nz % ny, cell // (nz * ny) % nx], 1)
    return torch.as_tensor(coords.astype(np.int32))


def scattered(count, size, clouds=1, seed=0):
    return voxels_at(np.random.default_rng(seed).choice(clouds * int(np.prod(size)), count, replace=False), size)


def on_device(grid):
    parts = (grid.voxel_of_cell, grid.cell_of_voxel, grid.num_voxels)
    return Grid(grid.size, *(part.to(DEVICE) for part in parts))


def partition(coords, model, clouds=1, room=None):
    room = max(1, len(coords)) if room is None else room
    grid = grid_from_coords(coords, model.grid_size, clouds, room)
    return FusedPartition(model, DEVICE, room, clouds)(on_device(grid))


def leaves(described):
    """What nested dataclasses and tuples hold."""
    if dataclasses.is_dataclass(described):
        described = tuple(getattr(described, part.name) for part in dataclasses.fields(described))
    return [leaf for part in described for leaf in leaves(part)] if isinstance(described, tuple) else [described]


def assert_same(stages, coords, model, clouds=1):
    """The same sets as from torch, with the same slots, in tensors of the announced size."""
    expected = partition_sets(coords, model, clouds)
    found = partition_from_fused(stages, model)
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    room = len(stages[0].grid.cell_of_voxel)
    for stage, size, capacity, theirs in zip(
        stages, model.stage_grids, capacity_for(model, room, clouds).stages, expected.stages, strict=True
    ):
        assert stage.grid.size == size
        assert len(stage.grid.cell_of_voxel) == capacity.voxels
        count = int(stage.grid.num_voxels)
        inverse = torch.full((clouds * int(np.prod(size)),), -1, dtype=torch.int32)
        inverse[stage.grid.cell_of_voxel[:count].long().cpu()] = torch.arange(count, dtype=torch.int32)
        assert torch.equal(stage.grid.voxel_of_cell.cpu(), inverse)
        for own, published, most in zip(stage.sets, theirs.sets, capacity.sets, strict=True):
            if own is not None:
                assert own.order.shape == own.position.shape == (2, capacity.voxels)
                for order, position in zip(own.order[:, :count].long(), own.position, strict=True):
                    assert position[order].tolist() == list(range(count))
                assert own.set_start.shape == (most + 1,)
                # Nobody is in two sets, and those of a set follow each other.
                sizes = (~published.mask[0]).sum(1)
                starts = torch.cat([sizes.new_zeros(1), torch.cumsum(sizes, 0)])
                assert own.set_start[: len(starts)].tolist() == starts.tolist()
        assert all(leaf.dtype == torch.int32 for leaf in leaves(stage) if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize("set_size", [36, 48, 90])
def test_no_voxel_is_in_two_sets(set_size):
    """Slot t of n voxels in S sets of L slots holds voxel floor(t n / (S L)), so set s begins with floor(s n / S)."""
    for count in range(1, 2001):
        num_sets = -(-count // set_size)
        voxel = (np.arange(num_sets * set_size) * count // (num_sets * set_size)).reshape(num_sets, set_size)
        assert (voxel[:, 0] == np.arange(num_sets) * count // num_sets).all()
        assert (voxel[1:, 0] == voxel[:-1, -1] + 1).all()


FLAT_CELLS = {
    "none": [],
    "the first one": [0],
    "the last one": [20 * 14 - 1],
    "the border": [x * 14 + y for x in range(20) for y in range(14) if x in (0, 19) or y in (0, 13)],
    "one window": [x * 14 + y for x in range(8) for y in range(8)],
    "one window of two sets": range(8),
    "all": range(20 * 14),
}


@needs_triton
@pytest.mark.parametrize("cells", FLAT_CELLS.values(), ids=FLAT_CELLS)
def test_pillars(cells):
    coords = voxels_at(cells, FLAT)
    assert_same(partition(coords, flat()), coords, flat())


@needs_triton
@pytest.mark.parametrize(("count", "set_size", "clouds"), [(90, 36, 1), (70, 1, 1), (160, 5, 2), (2, 48, 3)])
def test_random_pillars(count, set_size, clouds):
    coords = scattered(count, FLAT, clouds, seed=set_size)
    model = flat(set_size=set_size)
    assert_same(partition(coords, model, clouds, count + 50), coords, model, clouds)


@needs_triton
def test_windows_that_lie_outside_the_grid():
    """Offsets of more than a window, and windows larger than the grid."""
    model = flat(windows=((8, 8, 1), (30, 40, 1)), offsets=((9, 17, 0), (0, 25, 0)))
    coords = scattered(100, FLAT)
    assert_same(partition(coords, model), coords, model)


@needs_triton
def test_one_used_shift():
    coords = scattered(40, FLAT)
    (stage,) = partition(coords, flat(num_blocks=1))
    assert stage.sets[1] is None
    assert_same((stage,), coords, flat(num_blocks=1))


TALL_CELLS = 20 * 14 * 7


@needs_triton
@pytest.mark.parametrize(
    ("coords", "clouds", "room"),
    [
        pytest.param(lambda: voxels_at([], TALL), 1, 9, id="none"),
        pytest.param(lambda: voxels_at([TALL_CELLS - 1], TALL), 1, 1, id="the last one"),
        pytest.param(lambda: voxels_at(range(70, 84), TALL), 1, 20, id="two full columns"),
        pytest.param(lambda: voxels_at(range(TALL_CELLS), TALL), 1, TALL_CELLS, id="all"),
        pytest.param(lambda: scattered(300, TALL), 1, 2 * TALL_CELLS, id="more room than cells"),
        pytest.param(lambda: scattered(250, TALL, 2), 2, 260, id="two clouds"),
        pytest.param(lambda: scattered(60, TALL, 1, 5) + torch.tensor([1, 0, 0, 0]).int(), 2, 60, id="one is empty"),
    ],
)
def test_voxels(coords, clouds, room):
    assert_same(partition(coords(), tall(), clouds, room), coords(), tall(), clouds)


@needs_triton
def test_pooling_of_single_voxels():
    """A stage may hand on its voxels as they are."""
    stages = (dataclasses.replace(FLAT_STAGES[0], num_blocks=1), FLAT_STAGES[0])
    coords, model = scattered(50, FLAT), model_of(FLAT, stages)
    first, second = partition(coords, model)
    assert first.pooled.flatten().tolist() == list(range(50))
    assert_same((first, second), coords, model)


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled kernels keep their constants")
def test_more_than_a_program_takes_at_once(monkeypatch):
    """Voxels, windows and sets in many blocks."""
    kernels = importlib.import_module("dsvt_ros.kernels.set_partition")
    for name, size in (("VOXELS", 32), ("WINDOWS", 2), ("SETS", 4)):
        monkeypatch.setattr(kernels, name, kernels.tl.constexpr(size))
    for model, size in ((flat(), FLAT), (tall(), TALL)):
        coords = scattered(200, size, 2)
        assert_same(partition(coords, model, 2, 230), coords, model, 2)


@needs_triton
def test_repeated_runs_give_the_same_bytes():
    """From memory that held something else."""
    model, coords = tall(), scattered(120, TALL)
    grid = on_device(grid_from_coords(coords, TALL, 1, 128))
    run = FusedPartition(model, DEVICE, 128)
    runs = []
    for fill in (-7, 123_456_789):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_integers", lambda *shape, fill=fill: torch.full(shape, fill, device=DEVICE).int())
            runs.append(run(grid))
    for first, second in zip(*(leaves(partition_from_fused(stages, model)) for stages in runs), strict=True):
        assert first is second is None or torch.equal(first, second)


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(("model", "size"), [(flat(), FLAT), (tall(), TALL)], ids=["pillars", "voxels"])
def test_cuda_graph(model, size):
    """One capture serves clouds of any size."""
    grid = on_device(grid_from_coords(scattered(10, size), size, 1, 280))
    run = FusedPartition(model, DEVICE, 280)
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
