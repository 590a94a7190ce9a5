import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvt_ros.config import Backbone3dConfig, ModelConfig, StageConfig
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets

GRID = (48, 40, 1)


WINDOWS, OFFSETS = ((12, 12, 1), (24, 24, 1)), ((0, 0, 0), (6, 6, 0))
TALL_GRID = (48, 40, 8)


def model_of(*stages, grid=GRID) -> ModelConfig:
    demo = open_model("demo").model
    return dataclasses.replace(
        demo,
        point_cloud_range=(0.0, 0.0, 0.0, *map(float, grid)),
        voxel_size=(1.0, 1.0, 1.0),
        backbone_3d=Backbone3dConfig(64, 16, 2, stages),
    )


def model(set_size) -> ModelConfig:
    return model_of(StageConfig(2, set_size, WINDOWS, OFFSETS))


def sets_of(coords, set_size):
    (stage,) = partition_sets(coords, model(set_size)).stages
    return stage.sets


def random_coords(seed, count, batch=1, grid=GRID):
    rng = np.random.default_rng(seed)
    nx, ny, nz = grid
    key = np.sort(rng.choice(batch * nx * ny * nz, count, replace=False))
    b, x, y, z = key // (nx * ny * nz), key // (ny * nz) % nx, key // nz % ny, key % nz
    return torch.as_tensor(np.stack([b, z, y, x], 1).astype(np.int32))


def published_sets(coords, window, offset, set_size, order, grid=GRID):
    """Slow oracle after the paper: spread the sorted voxels of each window over its slots."""
    b, z, y, x = coords.numpy().astype(np.int64).T
    x, y, z = x + offset[0], y + offset[1], z + (offset[2] if window[2] < grid[2] else 0)
    nx, ny, nz = (-(-grid[a] // window[a]) + 1 for a in range(3))
    window_id = ((b * nx + x // window[0]) * ny + y // window[1]) * nz + z // window[2]
    inner = (y % window[1], x % window[0]) if order == 0 else (x % window[0], y % window[1])
    indices, mask = [], []
    for w in np.unique(window_id):
        members = np.flatnonzero(window_id == w)
        members = members[np.lexsort(((z % window[2])[members], inner[1][members], inner[0][members]))]
        count = len(members)
        num_sets = -(-count // set_size)
        for j in range(num_sets):
            picked = [members[(j * set_size + k) * count // (num_sets * set_size)] for k in range(set_size)]
            indices.append(picked)
            mask.append([k > 0 and picked[k] == picked[k - 1] for k in range(set_size)])
    return np.array(indices), np.array(mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 900), st.integers(1, 40), st.integers(1, 3))
def test_agrees_with_the_paper(seed, count, set_size, batch):
    coords = random_coords(seed, count, batch)
    assert_published(coords, partition_sets(coords, model(set_size), batch).stages[0], model(set_size), 0)


def assert_published(coords, stage, config, number):
    described, grid = config.backbone_3d.stages[number], config.stage_grids[number]
    for shift, (sets, window, offset) in enumerate(zip(stage.sets, described.windows, described.offsets, strict=True)):
        if shift not in config.backbone_3d.shifts[number]:
            assert sets is None
            continue
        for order in (0, 1):
            indices, mask = published_sets(coords, window, offset, described.set_size, order, grid)
            np.testing.assert_array_equal(sets.indices[order], indices)
            np.testing.assert_array_equal(sets.mask[order], mask)
            # Every voxel has exactly one unmasked slot, and the inverse index points there.
            flat, masked = sets.indices[order].reshape(-1), sets.mask[order].reshape(-1)
            assert torch.equal(flat[sets.slot_of_voxel[order]], torch.arange(len(coords)))
            assert not masked[sets.slot_of_voxel[order]].any()
            assert int((~masked).sum()) == len(coords)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 900), st.integers(1, 20), st.integers(1, 2))
def test_stages_and_pooling(seed, count, set_size, batch):
    """Sets of every stage, and every voxel in the slot of its height of what it is pooled into."""
    windows = tuple((12, 12, height) for height in (8, 4))
    config = model_of(
        StageConfig(3, set_size, windows, ((0, 0, 0), (6, 6, 2)), pool_z=4),
        StageConfig(1, set_size, ((12, 12, 2), (24, 24, 1)), ((0, 0, 0), (6, 6, 1)), pool_z=2),
        StageConfig(1, set_size, WINDOWS, OFFSETS),
        grid=TALL_GRID,
    )
    assert config.stage_grids == ((48, 40, 8), (48, 40, 2), (48, 40, 1))
    assert config.backbone_3d.shifts == ((0, 1, 0), (1,), (0,))
    coords = random_coords(seed, count, batch, TALL_GRID)
    partition = partition_sets(coords, config, batch)
    for number, stage in enumerate(partition.stages):
        assert_published(coords, stage, config, number)
        if stage.pooling is None:
            assert torch.equal(coords, partition.coords)
            break
        stride = config.backbone_3d.stages[number].pool_z
        b, z, y, x = coords.long().T
        pooled = torch.unique(torch.stack([b, x, y, z // stride], 1), dim=0)  # in the order of voxels
        target, slot = torch.nonzero(~stage.pooling.mask).T
        voxel = stage.pooling.indices[target, slot]
        assert sorted(voxel.tolist()) == list(range(len(coords))), "each voxel in one slot"
        assert torch.equal(slot, z[voxel] % stride)
        assert torch.equal(pooled[target], torch.stack([b, x, y, z // stride], 1)[voxel])
        assert not stage.pooling.indices[stage.pooling.mask].any()
        coords = pooled[:, [0, 3, 2, 1]].int()
    assert not partition.coords[:, 1].any()


def test_cells_follow_the_window():
    coords = torch.tensor([[0, 0, 13, 5]], dtype=torch.int32)
    first, second = partition_sets(coords, model(4)).stages[0].cells
    assert first.tolist() == [(13 % 12) * 12 + 5]
    assert second.tolist() == [(13 + 6) * 24 + (5 + 6)]


def test_no_voxels():
    for sets in sets_of(torch.zeros(0, 4, dtype=torch.int32), 36):
        assert sets.indices.shape == (2, 0, 36)
        assert sets.slot_of_voxel.shape == (2, 0)


def test_one_voxel_fills_its_set():
    sets, _ = sets_of(torch.tensor([[0, 0, 3, 3]], dtype=torch.int32), 5)
    assert sets.indices[0].tolist() == [[0, 0, 0, 0, 0]]
    assert sets.mask[0].tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize("order", [0, 1])
def test_sets_stay_inside_their_window(order):
    coords = random_coords(5, 600)
    sets, _ = sets_of(coords, 7)
    window = torch.stack([coords[:, 2] // 12, coords[:, 3] // 12], 1)[sets.indices[order]]
    assert (window == window[:, :1]).all()
