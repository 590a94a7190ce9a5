"""Padding to fixed capacities, and what goes when a cloud exceeds them."""

import dataclasses

import numpy as np
import pytest
import torch

from dsvt_ros.capacity import Capacity, capacity_for, default_voxels, keep_nearest, write_padded
from dsvt_ros.export.networks import PARTITION_TENSORS, partition_from_tensors, sparse_specs, tensors_for
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
    target = partition_from_tensors(room[name] for name in PARTITION_TENSORS)
    write_padded(partition, target)
    return target


def test_sets_of_the_published_grid():
    """39 x 39 windows of the first shift and 20 x 20 of the second lie on the grid of 468 x 468 cells."""
    model = open_model("waymo_pillar").model
    assert capacity_for(model, 40960) == Capacity(40960, ((40960 + 1521 * 35) // 36, (40960 + 400 * 35) // 36))
    assert default_voxels(model) == 40960
    assert capacity_for(model, 1) == Capacity(1, (1, 1))


def test_default_of_a_tiny_grid(demo):
    tiny = dataclasses.replace(demo, point_cloud_range=(-2.56, -2.56, -2.0, 2.56, 2.56, 4.0))
    assert default_voxels(tiny) == 48


@pytest.mark.parametrize("count", [1, 2, 37, 500, 20000, 400000])
def test_sets_always_suffice(demo, count):
    voxels = voxels_of(demo, count)
    partition = partition_sets(voxels.coords, demo.grid_size, demo.backbone_3d)
    capacity = capacity_for(demo, len(voxels))
    for shift, sets in zip(partition.shifts, capacity.sets, strict=True):
        assert shift.set_indices.shape[1] <= sets


def test_sets_suffice_in_the_worst_case(demo):
    """One voxel more than a set holds in as many windows as possible."""
    window, size = demo.backbone_3d.windows[0], demo.backbone_3d.set_size
    cells = torch.arange(320)
    y, x = torch.meshgrid(cells, cells, indexing="ij")
    rank = (y % window[1]) * window[0] + x % window[0]
    chosen = torch.nonzero(rank <= size)
    coords = torch.cat([torch.zeros(len(chosen), 2, dtype=torch.int64), chosen], 1).int()
    partition = partition_sets(coords, demo.grid_size, demo.backbone_3d)
    found = partition.shifts[0].set_indices.shape[1]
    room = capacity_for(demo, len(coords)).sets[0]
    assert 0.98 * room <= found <= room


def test_padding_changes_no_voxel(demo):
    torch.manual_seed(0)
    backbone = SetAttentionBackbone(demo.backbone_3d, flat=True).eval()
    voxels = voxels_of(demo, 300)
    features = torch.randn(len(voxels), 64)
    partition = partition_sets(voxels.coords, demo.grid_size, demo.backbone_3d)
    capacity = capacity_for(demo, 400)
    with torch.inference_mode():
        expected = backbone(features, partition)
        more = torch.cat([features, torch.zeros(400 - len(features), 64)])
        padded = backbone(more, padded_to(partition, demo, capacity))
    assert padded.shape == (400, 64)
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded[: len(voxels)], expected, rtol=0, atol=1e-5)


def test_padded_tensors(demo):
    voxels = voxels_of(demo, 50)
    partition = partition_sets(voxels.coords, demo.grid_size, demo.backbone_3d)
    capacity = capacity_for(demo, 64)
    padded = padded_to(partition, demo, capacity)
    for before, after, sets in zip(partition.shifts, padded.shifts, capacity.sets, strict=True):
        assert after.set_indices.shape == after.set_mask.shape == (2, sets, 36)
        assert after.slot_of_voxel.shape == (2, 64)
        assert after.cell_of_voxel.shape == (64,)
        assert {t.dtype for t in (after.set_indices, after.slot_of_voxel, after.cell_of_voxel)} == {torch.int32}
        count = before.set_indices.shape[1]
        assert torch.equal(after.set_mask[:, :count], before.set_mask)
        assert not after.set_mask[:, :, 0].any()
        assert after.set_mask[:, count:, 1:].all()
        assert not after.set_indices[:, count:].any()
        assert not after.slot_of_voxel[:, len(voxels) :].any()
        assert not after.cell_of_voxel[len(voxels) :].any()


def test_full_capacity_needs_no_padding(demo):
    voxels = voxels_of(demo, 50)
    partition = partition_sets(voxels.coords, demo.grid_size, demo.backbone_3d)
    counts = [shift.set_indices.shape[1] for shift in partition.shifts]
    same = padded_to(partition, demo, Capacity(len(voxels), (counts[0], counts[1])))
    assert torch.equal(same.shifts[0].set_mask, partition.shifts[0].set_mask)
    assert torch.equal(same.shifts[1].set_indices.long(), partition.shifts[1].set_indices)


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
