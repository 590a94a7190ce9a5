"""Padding to fixed capacities, and what goes when a cloud exceeds them."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import tiny_voxel_config

from dsvt_ros.capacity import (
    Capacity,
    StageCapacity,
    capacity_for,
    counts_of,
    default_voxels,
    keep_nearest,
    write_padded,
)
from dsvt_ros.export.networks import partition_from_tensors, sparse_specs, tensors_for
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.set_attention import SetAttentionBackbone
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize


@pytest.fixture(scope="module")
def demo():
    return open_model("demo").model


def voxels_of(model, count, seed=0):
    rng = np.random.default_rng(seed)
    low, high = model.point_cloud_range[:3], model.point_cloud_range[3:]
    xyz = rng.uniform(low, high, (count, 3))
    return voxelize(torch.as_tensor(np.concatenate([xyz, np.zeros((count, 1))], 1), dtype=torch.float32), model)


def padded_to(partition, model, capacity):
    """A copy of `partition` in tensors that held something else before."""
    room = tensors_for(sparse_specs(model, capacity, "float32")[0], torch.device("cpu"))
    for values in room.values():
        values.fill_(1)
    target = partition_from_tensors(room, model.backbone_3d)
    write_padded(partition, target)
    return target


def one_stage(voxels, *sets):
    return Capacity((StageCapacity(voxels, sets),))


def test_sets_of_the_published_grid():
    """39 x 39 windows of the first shift and 20 x 20 of the second lie on the grid of 468 x 468 cells."""
    model = open_model("waymo_pillar").model
    assert capacity_for(model, 40960) == one_stage(40960, (40960 + 1521 * 35) // 36, (40960 + 400 * 35) // 36)
    assert capacity_for(model, 81920, clouds=2) == one_stage(81920, (81920 + 3042 * 35) // 36, (81920 + 800 * 35) // 36)
    assert default_voxels(model) == 40960
    assert capacity_for(model, 1) == one_stage(1, 1, 1)


def test_default_of_a_tiny_grid(demo):
    tiny = dataclasses.replace(demo, point_cloud_range=(-2.56, -2.56, -2.0, 2.56, 2.56, 4.0))
    assert default_voxels(tiny) == 48


@pytest.mark.parametrize("count", [1, 2, 37, 500, 20000, 400000])
def test_sets_always_suffice(demo, count):
    voxels = voxels_of(demo, count)
    partition = partition_sets(voxels.coords, demo)
    capacity = capacity_for(demo, len(voxels))
    assert_fits(partition, capacity)


def assert_fits(partition, capacity):
    for needed, room in zip(counts_of(partition).stages, capacity.stages, strict=True):
        assert needed.voxels <= room.voxels
        assert all(found <= most for found, most in zip(needed.sets, room.sets, strict=True))


@pytest.mark.parametrize("count", [1, 2, 37, 500, 6000])
def test_every_stage_has_room(count):
    model = tiny_voxel_config()
    voxels = voxels_of(model, count)
    capacity = capacity_for(model, len(voxels))
    assert_fits(partition_sets(voxels.coords, model), capacity)
    # Blocks alternate: the second stage uses the first shift, the last one the second.
    assert [[bool(sets) for sets in stage.sets] for stage in capacity.stages] == [[1, 1], [1, 0], [0, 1]]
    assert [stage.voxels for stage in capacity.stages] == [min(len(voxels), 1024 * height) for height in (8, 2, 1)]


def test_sets_suffice_in_the_worst_case(demo):
    """One voxel more than a set holds in as many windows as possible."""
    (stage,) = demo.backbone_3d.stages
    window, size = stage.windows[0], stage.set_size
    cells = torch.arange(320)
    y, x = torch.meshgrid(cells, cells, indexing="ij")
    rank = (y % window[1]) * window[0] + x % window[0]
    chosen = torch.nonzero(rank <= size)
    coords = torch.cat([torch.zeros(len(chosen), 2, dtype=torch.int64), chosen], 1).int()
    partition = partition_sets(coords, demo)
    found = counts_of(partition).stages[0].sets[0]
    room = capacity_for(demo, len(coords)).stages[0].sets[0]
    assert 0.98 * room <= found <= room


@pytest.mark.parametrize("name", ["demo", "tiny_voxel"])
def test_padding_changes_no_voxel(demo, name):
    torch.manual_seed(0)
    model = demo if name == "demo" else tiny_voxel_config()
    backbone = SetAttentionBackbone(model).eval()
    voxels = voxels_of(model, 300)
    features = torch.randn(len(voxels), model.backbone_3d.channels)
    partition = partition_sets(voxels.coords, model)
    with torch.inference_mode():
        expected = backbone(features, partition)
        more = torch.cat([features, torch.zeros(400 - len(features), features.shape[1])])
        padded = backbone(more, padded_to(partition, model, capacity_for(model, 400)))
    assert len(padded) == 400
    assert len(expected) == len(partition.coords)
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded[: len(expected)], expected, rtol=0, atol=1e-5)


def test_padded_tensors():
    model = tiny_voxel_config()
    voxels = voxels_of(model, 50)
    partition = partition_sets(voxels.coords, model)
    capacity = capacity_for(model, 64)
    padded = padded_to(partition, model, capacity)
    needed = counts_of(partition).stages
    for number, (before, after, room) in enumerate(zip(partition.stages, padded.stages, capacity.stages, strict=True)):
        own = needed[number].voxels
        for cells, expected in zip(after.cells, before.cells, strict=True):
            assert cells.dtype == torch.int32
            assert cells.tolist() == expected.tolist() + [0] * (room.voxels - own)
        for shift, (sets, expected) in enumerate(zip(after.sets, before.sets, strict=True)):
            if expected is None:
                assert sets is None
                continue
            size, count = model.backbone_3d.stages[number].set_size, needed[number].sets[shift]
            assert sets.indices.shape == sets.mask.shape == (2, room.sets[shift], size)
            assert sets.slot_of_voxel.shape == (2, room.voxels)
            assert sets.indices.dtype == sets.slot_of_voxel.dtype == torch.int32
            assert torch.equal(sets.indices[:, :count].long(), expected.indices)
            assert torch.equal(sets.mask[:, :count], expected.mask)
            assert not sets.mask[:, :, 0].any()
            assert sets.mask[:, count:, 1:].all()
            assert not sets.indices[:, count:].any()
            assert torch.equal(sets.slot_of_voxel[:, :own].long(), expected.slot_of_voxel)
            assert not sets.slot_of_voxel[:, own:].any()
        if before.pooling is None:
            assert after.pooling is None
            continue
        pooled = len(before.pooling.indices)
        assert torch.equal(after.pooling.indices[:pooled].long(), before.pooling.indices)
        assert torch.equal(after.pooling.mask[:pooled], before.pooling.mask)
        assert not after.pooling.indices[pooled:].any()
        assert after.pooling.mask[pooled:].all()


def test_full_capacity_needs_no_padding(demo):
    voxels = voxels_of(demo, 50)
    partition = partition_sets(voxels.coords, demo)
    same = padded_to(partition, demo, counts_of(partition)).stages[0]
    for padded, sets in zip(same.sets, partition.stages[0].sets, strict=True):
        assert torch.equal(padded.mask, sets.mask)
        assert torch.equal(padded.indices.long(), sets.indices)


def test_the_farthest_voxels_go(demo):
    voxels = voxels_of(demo, 2000)
    kept = keep_nearest(voxels, demo, 700)
    assert len(kept) == 700
    centers = (voxels.coords[:, [3, 2]] + 0.5) * 0.32 - 51.2
    limit = torch.linalg.vector_norm(centers, dim=1).sort().values[700]
    kept_centers = (kept.coords[:, [3, 2]] + 0.5) * 0.32 - 51.2
    assert torch.linalg.vector_norm(kept_centers, dim=1).max() <= limit + 1e-4
    # Every point still lies in its voxel, and no voxel has lost one.
    again = voxelize(kept.points, demo)
    assert torch.equal(again.coords, kept.coords)
    assert torch.equal(again.voxel_of_point, kept.voxel_of_point)
    near = torch.isin(voxels.voxel_of_point, torch.nonzero((voxels.coords[:, None] == kept.coords).all(2).any(1))[:, 0])
    assert torch.equal(kept.points, voxels.points[near])


def test_enough_room_drops_nothing(demo):
    voxels = voxels_of(demo, 100)
    assert keep_nearest(voxels, demo, len(voxels)) is voxels
