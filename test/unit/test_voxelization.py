import numpy as np
import pytest
import torch
from tiny import tiny_voxel_config

from dsvt_ros.model.folder import open_model
from dsvt_ros.voxelization import voxelize


@pytest.fixture(scope="module")
def model():
    return open_model("demo").model


def cloud(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_cell_of_a_point_by_hand(model):
    # 51.2 m / 0.32 m = 160 cells left of the origin; x = 0.33 lies in cell 161, y = -0.01 in cell 159.
    voxels = voxelize(cloud([0.33, -0.01, 0.5, 0.2]), model)
    assert voxels.coords.tolist() == [[0, 0, 159, 161]]
    assert voxels.voxel_of_point.tolist() == [0]


def test_order_is_batch_then_x_then_y(model):
    points = cloud([5, 5, 0, 0], [-5, 5, 0, 0], [5, -5, 0, 0], [-5, 5, 0, 0])
    voxels = voxelize(points, model, torch.tensor([0, 1, 0, 0]))
    batch, _, y, x = voxels.coords.unbind(1)
    keys = list(zip(batch.tolist(), x.tolist(), y.tolist(), strict=True))
    assert keys == sorted(keys)
    assert len(voxels) == 4
    assert voxels.batch_size == 2


def test_range_is_half_open(model):
    low, high = -51.2, 51.2
    points = cloud([low, 0, 0, 0], [low - 1e-3, 0, 0, 0], [high, 0, 0, 0], [high - 1e-3, 0, 0, 0], [0, 0, 4.0, 0])
    voxels = voxelize(points, model)
    assert voxels.points[:, 0].tolist() == pytest.approx([low, high - 1e-3])
    assert voxels.coords[:, 3].tolist() == [0, 319]


def test_empty_and_outside(model):
    for points in (torch.zeros(0, 4), cloud([100, 0, 0, 0])):
        voxels = voxelize(points, model)
        assert len(voxels) == 0
        assert voxels.coords.shape == (0, 4)


def test_agrees_with_unique(model):
    """An independent oracle: NumPy's unique over the cells' keys."""
    rng = np.random.default_rng(3)
    points = rng.uniform([-60, -60, -3, 0], [60, 60, 5, 1], (5000, 4)).astype(np.float32)
    voxels = voxelize(torch.as_tensor(points), model)
    cell = np.floor((points[:, :3] - np.float32([-51.2, -51.2, -2])) / np.float32([0.32, 0.32, 6])).astype(int)
    inside = ((cell >= 0) & (cell < [320, 320, 1])).all(1)
    keys, inverse = np.unique(cell[inside, 0] * 320 + cell[inside, 1], return_inverse=True)
    np.testing.assert_array_equal(voxels.coords[:, 3] * 320 + voxels.coords[:, 2], keys)
    np.testing.assert_array_equal(voxels.voxel_of_point, inverse)


def test_order_of_points_does_not_matter(model):
    rng = np.random.default_rng(4)
    points = torch.as_tensor(rng.uniform(-50, 50, (1000, 4)).astype(np.float32))
    points[:, 2] = 0
    shuffled = points[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(voxelize(points, model).coords, voxelize(shuffled, model).coords)


def test_voxels_along_z():
    voxels = voxelize(cloud([0.1, 0.1, -1.9, 0], [0.1, 0.1, 3.9, 0]), tiny_voxel_config())  # 0.75 m high
    assert voxels.coords[:, 1].tolist() == [0, 7]
