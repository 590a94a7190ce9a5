"""Voxels to windows to sets: which voxels attend together (DSVT section 3.1, "dynamic set partition")."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.config import Backbone3dConfig
from dsvt_ros.structures import SetPartition, WindowShift

Cells = tuple[int, int, int]


def partition_sets(coords: Tensor, grid: Cells, config: Backbone3dConfig) -> SetPartition:
    """Split the voxels of each window into sets of `set_size` slots, for both window shifts.

    Args:
        coords: (V, 4) int32 voxel coordinates ``(batch, z, y, x)``.
        grid: Cells of the whole grid in x, y, z.
        config: Windows, offsets and set size.

    Returns:
        The same sets, in the same order, as the published `DSVTInputLayer`.
    """
    first, second = (
        _partition_shift(coords.long(), grid, window, offset, config.set_size)
        for window, offset in zip(config.windows, config.offsets, strict=True)
    )
    return SetPartition((first, second))


def _partition_shift(coords: Tensor, grid: Cells, window: Cells, offset: Cells, set_size: int) -> WindowShift:
    wx, wy, wz = window
    # One spare window a side holds what the offset pushes over the grid's edge.
    windows_y, windows_z = (-(-grid[axis] // window[axis]) + 1 for axis in (1, 2))
    windows_x = -(-grid[0] // wx) + 1
    batch, z, y, x = coords.unbind(1)
    x, y = x + offset[0], y + offset[1]
    # A window as tall as the grid is never shifted in z: there is nothing to pair it with.
    z = z + (offset[2] if wz < grid[2] else 0)
    window_id = ((batch * windows_x + x // wx) * windows_y + y // wy) * windows_z + z // wz
    x, y, z = x % wx, y % wy, z % wz

    sort_y = window_id * (wx * wy * wz) + (y * wx + x) * wz + z
    sort_x = window_id * (wx * wy * wz) + (x * wy + y) * wz + z
    orders = [torch.argsort(key) for key in (sort_y, sort_x)]
    _, voxels_in_window = torch.unique_consecutive(window_id[orders[0]], return_counts=True)

    sets_in_window = (voxels_in_window + set_size - 1) // set_size
    first_voxel = torch.cumsum(voxels_in_window, 0) - voxels_in_window
    first_set = torch.cumsum(sets_in_window, 0) - sets_in_window

    # Slot t of the n voxels of a window with S sets of L slots holds sorted voxel floor(t * n / (S * L)): the voxels
    # are spread evenly, and the slots that are left over repeat their predecessor.
    window_of_set = torch.repeat_interleave(sets_in_window)
    slot = torch.arange(len(window_of_set), device=coords.device) - first_set[window_of_set]
    slots = slot[:, None] * set_size + torch.arange(set_size, device=coords.device)
    num_slots = sets_in_window * set_size
    rank = slots * voxels_in_window[window_of_set, None] // num_slots[window_of_set, None]
    row = first_voxel[window_of_set, None] + rank
    mask = torch.zeros_like(row, dtype=torch.bool)
    mask[:, 1:] = row[:, 1:] == row[:, :-1]

    # The inverse: sorted voxel r sits unmasked in slot ceil(r * S * L / n), or, where the set before ends on the same
    # voxel, that first slot is the one kept.
    window_of_row = torch.repeat_interleave(voxels_in_window)
    rank_of_row = torch.arange(len(coords), device=coords.device) - first_voxel[window_of_row]
    count = voxels_in_window[window_of_row]
    slot_of_row = (rank_of_row * num_slots[window_of_row] + count - 1) // count
    slot_of_row += first_set[window_of_row] * set_size
    slot_of_voxel = torch.stack([torch.empty_like(order).index_put_((order,), slot_of_row) for order in orders])
    return WindowShift(
        set_indices=torch.stack([order[row] for order in orders]),
        set_mask=torch.stack([mask, mask]),
        slot_of_voxel=slot_of_voxel,
        cell_of_voxel=(z * wy + y) * wx + x,
    )
