"""Windows and sets from Triton's kernels against those of torch."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from partition_cases import (
    FLAT,
    FLAT_MODEL,
    FLAT_STAGES,
    MODELS,
    OUTSIDE_MODEL,
    PILLARS,
    RANDOM_PILLARS,
    TALL,
    TALL_MODEL,
    VOXELS,
    assert_same_sets,
    check_graph,
    flat,
    leaves,
    model_of,
    scattered,
    voxels_at,
)
from ragged_sets import grid_from_coords, partition_from_fused

from dsvt_ros.fused.partition import FusedPartition

_interpreter = interpreted("set_partition")


def partition(coords, model, clouds=1, room=None):
    room = max(1, len(coords)) if room is None else room
    return FusedPartition(model, DEVICE, room, clouds)(grid_from_coords(coords, model.grid_size, clouds, room))


def assert_same(stages, coords, model, clouds=1):
    """The same sets; nobody is in two of them, and those of a set follow each other."""
    expected = assert_same_sets(stages, coords, model, clouds)
    for stage, theirs in zip(stages, expected.stages, strict=True):
        count = int(stage.grid.num_voxels)
        for own, published in zip(stage.sets, theirs.sets, strict=True):
            if own is not None:
                assert own.position.shape == own.order.shape
                for order, position in zip(own.order[:, :count].long(), own.position, strict=True):
                    assert position[order].tolist() == list(range(count))
                sizes = (~published.mask[0]).sum(1)
                starts = torch.cat([sizes.new_zeros(1), torch.cumsum(sizes, 0)])
                assert own.set_start[: len(starts)].tolist() == starts.tolist()


@pytest.mark.parametrize("set_size", [36, 48, 90])
def test_no_voxel_is_in_two_sets(set_size):
    """Slot t of n voxels in S sets of L slots holds voxel floor(t n / (S L)), so set s begins with floor(s n / S)."""
    for count in range(1, 2001):
        num_sets = -(-count // set_size)
        voxel = (np.arange(num_sets * set_size) * count // (num_sets * set_size)).reshape(num_sets, set_size)
        assert (voxel[:, 0] == np.arange(num_sets) * count // num_sets).all()
        assert (voxel[1:, 0] == voxel[:-1, -1] + 1).all()


@needs_triton
@PILLARS
def test_pillars(cells):
    coords = voxels_at(cells, FLAT)
    assert_same(partition(coords, FLAT_MODEL), coords, FLAT_MODEL)


@needs_triton
@RANDOM_PILLARS
def test_random_pillars(count, set_size, clouds):
    coords, model = scattered(count, FLAT, clouds, seed=set_size), flat(set_size=set_size)
    assert_same(partition(coords, model, clouds, count + 50), coords, model, clouds)


@needs_triton
def test_windows_that_lie_outside_the_grid():
    coords = scattered(100, FLAT)
    assert_same(partition(coords, OUTSIDE_MODEL), coords, OUTSIDE_MODEL)


@needs_triton
def test_one_used_shift():
    coords = scattered(40, FLAT)
    (stage,) = partition(coords, flat(num_blocks=1))
    assert stage.sets[1] is None
    assert_same((stage,), coords, flat(num_blocks=1))


@needs_triton
@VOXELS
def test_voxels(coords, clouds, room):
    assert_same(partition(coords, TALL_MODEL, clouds, room), coords, TALL_MODEL, clouds)


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
    for model, size in ((FLAT_MODEL, FLAT), (TALL_MODEL, TALL)):
        coords = scattered(200, size, 2)
        assert_same(partition(coords, model, 2, 230), coords, model, 2)


@needs_triton
def test_repeated_runs_give_the_same_bytes():
    """From memory that held something else."""
    model, coords = TALL_MODEL, scattered(120, TALL)
    grid = grid_from_coords(coords, TALL, 1, 128)
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
@MODELS
def test_cuda_graph(model):
    check_graph(FusedPartition(model, DEVICE, 280), model, assert_same)
