"""Voxels to windows to sets: which voxels attend together (DSVT section 3.1, "dynamic set partition")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsvt_ros.config import Cells, ModelConfig
from dsvt_ros.structures import Pooling, SetPartition, StagePartition, VoxelSets


def partition_sets(coords: Tensor, model: ModelConfig) -> SetPartition:
    """Split the voxels of each window into sets, for all stages and the window shifts that their blocks use.

    Args:
        coords: (V, 4) int32 voxel coordinates ``(batch, z, y, x)``, ordered by batch, x, y, z.
        model: Grid, windows, offsets and set sizes.

    Returns:
        The same sets, in the same order, as the published `DSVTInputLayer`.
    """
    backbone = model.backbone_3d
    stages = []
    for number, (stage, grid) in enumerate(zip(backbone.stages, model.stage_grids, strict=True)):
        first, second = (
            _find_windows(coords, grid, window, offset)
            for window, offset in zip(stage.windows, stage.offsets, strict=True)
        )
        sets = [
            _split_windows(windows, stage.set_size) if shift in backbone.shifts[number] else None
            for shift, windows in enumerate((first, second))
        ]
        pooling = None
        if number < len(backbone.stages) - 1:
            pooling, coords = _pool(coords, grid, stage.pool_z)
        stages.append(StagePartition((first.cell, second.cell), (sets[0], sets[1]), pooling))
    return SetPartition(tuple(stages), coords)


@dataclass(frozen=True)
class _Windows:
    """Where voxels lie under one window shift.

    Attributes:
        window: (V,) int64 window of each voxel.
        cell: (V,) int64 position inside it, ``(z * wy + y) * wx + x``.
        orders: Voxels sorted by window, and inside a window by y, x, z or by x, y, z.
    """

    window: Tensor
    cell: Tensor
    orders: tuple[Tensor, Tensor]


def _find_windows(coords: Tensor, grid: Cells, window: Cells, offset: Cells) -> _Windows:
    wx, wy, wz = window
    # One spare window a side holds what the offset pushes over the grid's edge.
    windows_x, windows_y, windows_z = (-(-cells // size) + 1 for cells, size in zip(grid, window, strict=True))
    batch, z, y, x = coords.long().unbind(1)
    x, y = x + offset[0], y + offset[1]
    # A window as tall as the grid is never shifted in z: there is nothing to pair it with.
    z = z + (offset[2] if wz < grid[2] else 0)
    window_id = ((batch * windows_x + x // wx) * windows_y + y // wy) * windows_z + z // wz
    x, y, z = x % wx, y % wy, z % wz
    first = window_id * (wx * wy * wz)
    by_y, by_x = (y * wx + x) * wz + z, (x * wy + y) * wz + z
    orders = (torch.argsort(first + by_y), torch.argsort(first + by_x))
    return _Windows(window_id, (z * wy + y) * wx + x, orders)


def _split_windows(windows: _Windows, set_size: int) -> VoxelSets:
    device, orders = windows.window.device, windows.orders
    _, voxels_in_window = torch.unique_consecutive(windows.window[orders[0]], return_counts=True)
    sets_in_window = (voxels_in_window + set_size - 1) // set_size
    first_voxel = torch.cumsum(voxels_in_window, 0) - voxels_in_window
    first_set = torch.cumsum(sets_in_window, 0) - sets_in_window

    # Slot t of the n voxels of a window with S sets of L slots holds sorted voxel floor(t * n / (S * L)): the voxels
    # are spread evenly, and the slots that are left over repeat their predecessor.
    window_of_set = torch.repeat_interleave(sets_in_window)
    slot = torch.arange(len(window_of_set), device=device) - first_set[window_of_set]
    slots = slot[:, None] * set_size + torch.arange(set_size, device=device)
    num_slots = sets_in_window * set_size
    rank = slots * voxels_in_window[window_of_set, None] // num_slots[window_of_set, None]
    row = first_voxel[window_of_set, None] + rank
    mask = torch.zeros_like(row, dtype=torch.bool)
    mask[:, 1:] = row[:, 1:] == row[:, :-1]

    # The inverse: sorted voxel r sits unmasked in slot ceil(r * S * L / n), or, where the set before ends on the same
    # voxel, that first slot is the one kept.
    window_of_row = torch.repeat_interleave(voxels_in_window)
    rank_of_row = torch.arange(len(windows.window), device=device) - first_voxel[window_of_row]
    count = voxels_in_window[window_of_row]
    slot_of_row = (rank_of_row * num_slots[window_of_row] + count - 1) // count
    slot_of_row += first_set[window_of_row] * set_size
    return VoxelSets(
        indices=torch.stack([order[row] for order in orders]),
        mask=torch.stack([mask, mask]),
        slot_of_voxel=torch.stack([torch.empty_like(order).index_put_((order,), slot_of_row) for order in orders]),
    )


def _pool(coords: Tensor, grid: Cells, stride: int) -> tuple[Pooling, Tensor]:
    """Join `stride` voxels along z; also gives the coordinates of what they make, in the same order of axes."""
    height = -(-grid[2] // stride)
    batch, z, y, x = coords.long().unbind(1)
    key = ((batch * grid[0] + x) * grid[1] + y) * height + z // stride
    _, target, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    voxel = torch.arange(len(coords), device=coords.device)
    indices = voxel.new_zeros(len(counts), stride).index_put_((target, z % stride), voxel)
    mask = torch.ones_like(indices, dtype=torch.bool).index_put_((target, z % stride), voxel.new_zeros(1).bool())
    first = torch.cumsum(counts, 0) - counts
    return Pooling(indices, mask), torch.stack([batch, z // stride, y, x], 1)[first].int()
