"""Voxels to windows to sets: which voxels attend together (DSVT section 3.1, "dynamic set partition").

Nothing is sorted. Voxels come in the order of their cells, so a running count over the columns of the grid, laid out
window after window, says where in that order each of them goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsvt_ros.config import Cells, ModelConfig
from dsvt_ros.structures import Pooling, SetPartition, StagePartition, VoxelSets


def partition_sets(coords: Tensor, model: ModelConfig, batch_size: int = 1) -> SetPartition:
    """Split the voxels of each window into sets, for all stages and the window shifts that their blocks use.

    On a GPU the host waits once a stage, for the numbers of sets and of pooled voxels.

    Args:
        coords: (V, 4) int32 voxel coordinates ``(batch, z, y, x)``, ordered by batch, x, y, z.
        model: Grid, windows, offsets and set sizes.
        batch_size: Number of clouds.

    Returns:
        The same sets, in the same order, as the published `DSVTInputLayer`.
    """
    backbone = model.backbone_3d
    stages = []
    for number, (stage, grid) in enumerate(zip(backbone.stages, model.stage_grids, strict=True)):
        places = [
            _place(coords, batch_size, grid, window, offset)
            for window, offset in zip(stage.windows, stage.offsets, strict=True)
        ]
        layouts = {shift: _lay_out(places[shift], stage.set_size) for shift in sorted(set(backbone.shifts[number]))}
        pools = number < len(backbone.stages) - 1
        opens = _opens_pool(coords, stage.pool_z) if pools else None

        totals = [layout.num_sets for layout in layouts.values()] + ([] if opens is None else [opens.sum()])
        counts = torch.stack(totals).tolist()
        sets = {
            shift: _fill_sets(places[shift], layout, num_sets)
            for (shift, layout), num_sets in zip(layouts.items(), counts, strict=False)
        }
        pooling = None
        if opens is not None:
            pooling, coords = _pool(coords, opens, counts[-1], stage.pool_z)
        stages.append(StagePartition((places[0].cell, places[1].cell), (sets.get(0), sets.get(1)), pooling))
    return SetPartition(tuple(stages), coords)


@dataclass(frozen=True)
class _Place:
    """Where voxels lie under one window shift.

    Attributes:
        num_windows: Windows of all clouds, empty ones too.
        columns: Columns of cells in a window.
        height: Cells of the grid along z.
        window: (V,) int64 window of each voxel; windows count by batch, x, y, z.
        by_y: (V,) int64 column in the window, ``y * wx + x``.
        by_x: (V,) int64 column in the window, ``x * wy + y``.
        cell: (V,) int64 cell in the window, ``(z * wy + y) * wx + x``.
    """

    num_windows: int
    columns: int
    height: int
    window: Tensor
    by_y: Tensor
    by_x: Tensor
    cell: Tensor


def _place(coords: Tensor, batch_size: int, grid: Cells, window: Cells, offset: Cells) -> _Place:
    wx, wy, wz = window
    # A window as tall as the grid is never shifted in z: there is nothing to pair it with.
    offset = (offset[0], offset[1], offset[2] if wz < grid[2] else 0)
    nx, ny, nz = (-(-(cells + shift) // size) for cells, shift, size in zip(grid, offset, window, strict=True))
    batch, z, y, x = coords.long().unbind(1)
    window_x, x = _divide(x, offset[0], wx)
    window_y, y = _divide(y, offset[1], wy)
    window_of_voxel = (batch * nx + window_x) * ny + window_y
    by_y, by_x = y * wx + x, x * wy + y
    cell = by_y
    if grid[2] > 1:
        window_z, z = _divide(z, offset[2], wz)
        window_of_voxel = window_of_voxel * nz + window_z
        cell = z * (wy * wx) + by_y
    return _Place(batch_size * nx * ny * nz, wx * wy, grid[2], window_of_voxel, by_y, by_x, cell)


def _divide(values: Tensor, offset: int, size: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of ``(values + offset) / size``."""
    values = values + offset
    quotient = values // size
    return quotient, values - quotient * size


@dataclass(frozen=True)
class _Layout:
    """How the voxels of one window shift are divided into sets of L slots.

    Attributes:
        set_size: L.
        position: (2, V) int64, where each voxel comes among those of all windows, which are sorted by window and inside
            a window by y, x, z or by x, y, z.
        sets_in_window: (W,) int64.
        numbers: (W, 4) int64, of each window its first position, voxels, slots and first slot.
        num_sets: () int64, sets of all windows.
    """

    set_size: int
    position: Tensor
    sets_in_window: Tensor
    numbers: Tensor
    num_sets: Tensor


def _lay_out(place: _Place, set_size: int) -> _Layout:
    num_voxels, num_columns = len(place.window), place.num_windows * place.columns
    first_column = place.window * place.columns
    # Both orders in one count: behind the columns by y come those by x.
    by_x = first_column + place.by_x
    columns = torch.cat([first_column + place.by_y, by_x + num_columns])
    voxels_before = columns.new_zeros(2 * num_columns + 1, dtype=torch.int32)
    ones = voxels_before.new_ones(1).expand(len(columns))
    voxels_before[1:].scatter_add_(0, columns, ones)
    voxels_before = torch.cumsum(voxels_before, 0, dtype=torch.int32)
    position = voxels_before.index_select(0, columns).view(2, num_voxels).long()
    position[1] -= num_voxels
    if place.height > 1:
        # The voxels of a column follow each other along z.
        voxel = torch.arange(num_voxels, device=columns.device)
        lowest = voxel.new_full((num_columns,), num_voxels).scatter_reduce_(0, by_x, voxel, "amin")
        position += voxel - lowest.index_select(0, by_x)

    first = voxels_before[: num_columns + 1 : place.columns].long()
    count = first[1:] - first[:-1]
    sets = (count + (set_size - 1)) // set_size
    last_set = torch.cumsum(sets, 0)
    numbers = torch.stack([first[:-1], count, sets * set_size, (last_set - sets) * set_size], dim=1)
    return _Layout(set_size, position, sets, numbers, last_set[-1])


def _fill_sets(place: _Place, layout: _Layout, num_sets: int) -> VoxelSets:
    # Slot t of the n voxels of a window with S sets of L slots holds sorted voxel floor(t * n / (S * L)): the voxels
    # are spread evenly, and the slots that are left over repeat their predecessor.
    position, set_size = layout.position, layout.set_size
    window_of_set = torch.repeat_interleave(layout.sets_in_window, output_size=num_sets)
    first, count, slots, first_slot = layout.numbers.index_select(0, window_of_set)[:, :, None].unbind(1)
    slot = torch.arange(num_sets * set_size, device=position.device).view(num_sets, set_size) - first_slot
    row = first + slot * count // slots
    mask = torch.zeros((2, *row.shape), dtype=torch.bool, device=row.device)
    mask[:, :, 1:] = row[:, 1:] == row[:, :-1]
    voxel = torch.arange(position.shape[1], device=position.device)
    order = torch.empty_like(position).scatter_(1, position, voxel.expand_as(position))
    indices = order.index_select(1, row.flatten()).view_as(mask)

    # The inverse: sorted voxel r sits unmasked in slot ceil(r * S * L / n), the first that holds it. Sets never share
    # a voxel.
    first, count, slots, first_slot = layout.numbers.index_select(0, place.window).unbind(1)
    slot_of_voxel = ((position - first) * slots + (count - 1)) // count + first_slot
    return VoxelSets(indices, mask, slot_of_voxel)


def _opens_pool(coords: Tensor, stride: int) -> Tensor:
    """(V,) bool, whether a voxel is the lowest of those that are pooled into one."""
    column = torch.cat([coords[:, :1], coords[:, 1:2] // stride, coords[:, 2:]], dim=1)
    opens = torch.ones(len(coords), dtype=torch.bool, device=coords.device)
    opens[1:] = (column[1:] != column[:-1]).any(1)
    return opens


def _pool(coords: Tensor, opens: Tensor, num_pooled: int, stride: int) -> tuple[Pooling, Tensor]:
    """Join `stride` voxels along z; also gives the coordinates of what they make, in the same order of axes."""
    target = torch.cumsum(opens, 0) - 1
    batch, z, y, x = coords.unbind(1)
    slot = target * stride + z % stride
    voxel = torch.arange(len(coords), device=coords.device)
    indices = voxel.new_zeros(num_pooled * stride).scatter_(0, slot, voxel)
    mask = torch.ones_like(indices, dtype=torch.bool).scatter_(0, slot, False)
    pooled = coords.new_empty(num_pooled, 4)
    # All voxels of a target write the same.
    pooled[target] = torch.stack([batch, z // stride, y, x], 1)
    return Pooling(indices.view(-1, stride), mask.view(-1, stride)), pooled
