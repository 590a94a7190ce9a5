import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvt_ros.config import Backbone3dConfig
from dsvt_ros.set_partition import partition_sets

GRID = (48, 40, 1)


def config(set_size, windows=((12, 12, 1), (24, 24, 1)), offsets=((0, 0, 0), (6, 6, 0))):
    return Backbone3dConfig(8, 16, 2, 1, set_size, windows, offsets)


def random_coords(seed, count, batch=1):
    rng = np.random.default_rng(seed)
    nx, ny, _ = GRID
    key = np.sort(rng.choice(batch * nx * ny, count, replace=False))
    b, x, y = key // (nx * ny), key // ny % nx, key % ny
    return torch.as_tensor(np.stack([b, np.zeros_like(b), y, x], 1).astype(np.int32))


def published_sets(coords, window, offset, set_size, order):
    """Slow oracle after the paper: spread the sorted voxels of each window over its slots."""
    b, _, y, x = coords.numpy().astype(np.int64).T
    x, y = x + offset[0], y + offset[1]
    nx, ny = (-(-GRID[a] // window[a]) + 1 for a in (0, 1))
    window_id = (b * nx + x // window[0]) * ny + y // window[1]
    inner = (y % window[1], x % window[0]) if order == 0 else (x % window[0], y % window[1])
    indices, mask = [], []
    for w in np.unique(window_id):
        members = np.flatnonzero(window_id == w)
        members = members[np.lexsort((inner[1][members], inner[0][members]))]
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
    setting = config(set_size)
    partition = partition_sets(coords, GRID, setting)
    for shift, window, offset in zip(partition.shifts, setting.windows, setting.offsets, strict=True):
        for order in (0, 1):
            indices, mask = published_sets(coords, window, offset, set_size, order)
            np.testing.assert_array_equal(shift.set_indices[order], indices)
            np.testing.assert_array_equal(shift.set_mask[order], mask)
            # Every voxel has exactly one unmasked slot, and the inverse index points there.
            flat, masked = shift.set_indices[order].reshape(-1), shift.set_mask[order].reshape(-1)
            assert torch.equal(flat[shift.slot_of_voxel[order]], torch.arange(count))
            assert not masked[shift.slot_of_voxel[order]].any()
            assert int((~masked).sum()) == count


def test_cells_follow_the_window():
    coords = torch.tensor([[0, 0, 13, 5]], dtype=torch.int32)
    first, second = partition_sets(coords, GRID, config(4)).shifts
    assert first.cell_of_voxel.tolist() == [(13 % 12) * 12 + 5]
    assert second.cell_of_voxel.tolist() == [(13 + 6) * 24 + (5 + 6)]


def test_no_voxels():
    partition = partition_sets(torch.zeros(0, 4, dtype=torch.int32), GRID, config(36))
    for shift in partition.shifts:
        assert shift.set_indices.shape == (2, 0, 36)
        assert shift.slot_of_voxel.shape == (2, 0)


def test_one_voxel_fills_its_set():
    shift, _ = partition_sets(torch.tensor([[0, 0, 3, 3]], dtype=torch.int32), GRID, config(5)).shifts
    assert shift.set_indices[0].tolist() == [[0, 0, 0, 0, 0]]
    assert shift.set_mask[0].tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize("order", [0, 1])
def test_sets_stay_inside_their_window(order):
    coords = random_coords(5, 600)
    shift, _ = partition_sets(coords, GRID, config(7)).shifts
    window = torch.stack([coords[:, 2] // 12, coords[:, 3] // 12], 1)[shift.set_indices[order]]
    assert (window == window[:, :1]).all()
