"""Windows and sets of fixed capacity against those of any size."""

import pytest
import torch
from fused_fixtures import DEVICE
from partition_cases import (
    FLAT,
    FLAT_MODEL,
    MODELS,
    OUTSIDE_MODEL,
    PILLARS,
    RANDOM_PILLARS,
    TALL_MODEL,
    VOXELS,
    assert_same_sets,
    check_graph,
    flat,
    scattered,
    voxels_at,
)
from ragged_sets import grid_from_coords

from dsvt_ros.padded.partition import PaddedPartition


def assert_same(stages, coords, model, clouds=1):
    """The same sets, and nobody in what is left of the capacity."""
    assert_same_sets(stages, coords, model, clouds)
    for stage in stages:
        count, every_row = int(stage.grid.num_voxels), torch.arange(len(stage.grid.cell_of_voxel), device=DEVICE)
        for own in stage.sets:
            if own is not None:
                assert (own.set_start[int(own.num_sets) :] == count).all()
                for order in own.order.long():
                    assert torch.equal(order.sort().values, every_row)
                    assert torch.equal(order[count:], every_row[count:])
        if stage.pooled is not None:
            assert (stage.pooled < count).all()


def check(coords, model, clouds=1, room=None):
    room = max(1, len(coords)) if room is None else room
    run = PaddedPartition(model, DEVICE, room, clouds)
    assert_same(run(grid_from_coords(coords, model.grid_size, clouds, room)), coords, model, clouds)


@PILLARS
@pytest.mark.parametrize("more", [0, 60])
def test_pillars(cells, more):
    check(voxels_at(cells, FLAT), FLAT_MODEL, room=max(1, len(cells)) + more)


@RANDOM_PILLARS
def test_random_pillars(count, set_size, clouds):
    check(scattered(count, FLAT, clouds, seed=set_size), flat(set_size=set_size), clouds, count + 50)


def test_windows_that_lie_outside_the_grid():
    check(scattered(100, FLAT), OUTSIDE_MODEL)


@VOXELS
def test_voxels(coords, clouds, room):
    check(coords, TALL_MODEL, clouds, room)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@MODELS
def test_cuda_graph(model):
    check_graph(PaddedPartition(model, DEVICE, 280), model, assert_same)
