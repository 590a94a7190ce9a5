"""Voxels to windows to sets on tensors of fixed capacity; `dsvt_ros.set_partition` says what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dsvt_ros.capacity import StageCapacity, capacity_for
from dsvt_ros.config import Cells, ModelConfig, StageConfig
from dsvt_ros.fused.structures import FusedStage, Grid, ShiftSets
from dsvt_ros.set_partition import Layout, lay_out

SPARE = 1024
"""Columns of voxels that there are not: if all counted in one, a GPU would add them up one by one."""


@dataclass(frozen=True)
class _Stage:
    config: StageConfig
    size: Cells
    shifts: tuple[int, ...]
    layout: Layout
    room: StageCapacity


class PaddedPartition:
    """Splits the voxels of each window into sets, for all stages, without the host waiting for numbers of them.

    In what it gives, `order` holds every row of the voxels once, those beyond their number at the end, and sets beyond
    their number are empty: `PaddedBackbone3d` needs both.
    """

    def __init__(self, model: ModelConfig, device: torch.device, voxels: int, clouds: int = 1) -> None:
        """Make tables.

        Args:
            model: Grid, windows, offsets and set sizes.
            device: Where the voxels are.
            voxels: Room for voxels in the first stage, those of all clouds together.
            clouds: Number of clouds.
        """
        self._clouds = clouds
        self._stages = []
        rooms = capacity_for(model, voxels, clouds).stages
        config = model.backbone_3d
        for stage, size, used, room in zip(config.stages, model.stage_grids, config.shifts, rooms, strict=True):
            shifts = tuple(sorted(set(used)))
            layout = lay_out(stage, shifts, (clouds, size[2], size[1], size[0]), device)
            self._stages.append(_Stage(stage, size, shifts, layout, room))

    def __call__(self, grid: Grid) -> tuple[FusedStage, ...]:
        """Partition the occupied cells of the first stage's grid."""
        stages = []
        for stage, following in pairwise((*self._stages, None)):
            assert stage is not None
            cells, sets = _partition(stage, grid)
            pooled, target = None, grid
            if following is not None:
                pooled, target = self._pool(stage, following, grid)
            stages.append(FusedStage(grid, cells, sets, pooled))
            grid = target
        return tuple(stages)

    def _pool(self, stage: _Stage, following: _Stage, grid: Grid) -> tuple[Tensor, Grid]:
        """The voxels in each slot of the next stage's voxels, and those."""
        stride, nz, next_nz = stage.config.pool_z, stage.size[2], following.size[2]
        row = torch.arange(len(grid.cell_of_voxel), dtype=torch.int32, device=grid.num_voxels.device)
        there = row < grid.num_voxels
        z = grid.cell_of_voxel % nz
        target = grid.cell_of_voxel // nz * next_nz + z // stride
        opens = there.clone()
        opens[1:] &= target[1:] != target[:-1]
        count = torch.cumsum(opens, 0, dtype=torch.int32)

        # Voxels that there are not write to a row behind the others.
        room = following.room.voxels
        pooled = row.new_full(((room + 1) * stride,), -1)
        pooled.scatter_(0, torch.where(there, (count - 1) * stride + z % stride, room * stride).long(), row)
        cell_of_voxel = row.new_zeros(room + 1)
        cell_of_voxel.scatter_(0, torch.where(there, count - 1, room).long(), target)
        num_cells = self._clouds * following.size[0] * following.size[1] * next_nz
        voxel_of_cell = row.new_full((num_cells + 1,), -1)
        voxel_of_cell.scatter_(0, torch.where(there, target, num_cells).long(), count - 1)
        next_grid = Grid(following.size, voxel_of_cell[:-1], cell_of_voxel[:-1], count[-1:])
        return pooled.view(-1, stride)[:-1], next_grid


def _partition(stage: _Stage, grid: Grid) -> tuple[tuple[Tensor, Tensor], tuple[ShiftSets | None, ShiftSets | None]]:
    """Cells and sets for both window shifts."""
    layout, num_shifts, num_columns = stage.layout, len(stage.shifts), sum(stage.layout.columns)
    nx, ny, nz = stage.size
    cell = grid.cell_of_voxel
    axes = (cell // (nx * ny * nz), cell % nz, cell // nz % ny, cell // (nz * ny) % nx)
    tables = [(table, axis) for table, axis in zip(layout.tables, axes, strict=True) if table is not None]
    rows = sum(table.index_select(1, axis) for table, axis in tables)
    assert isinstance(rows, Tensor)
    voxel = torch.arange(len(cell), device=cell.device)
    there = voxel < grid.num_voxels
    column = torch.where(there, rows[2 + num_shifts :], 2 * num_columns + voxel % SPARE)

    # Counting the voxels in the columns before it sorts a voxel, as those of one column already are in order.
    before = torch.zeros(2 * num_columns + SPARE + 1, dtype=torch.int32, device=cell.device)
    before[1:].scatter_add_(0, column.flatten(), before.new_ones(1).expand(column.numel()))
    before = torch.cumsum(before, 0, dtype=torch.int32)
    orders = torch.arange(2 * num_shifts, dtype=torch.int32, device=cell.device)[:, None]
    position = before.index_select(0, column.flatten()).view(column.shape) - orders * grid.num_voxels
    if layout.tables[1] is not None:
        column = column[:num_shifts].flatten()
        numbers = voxel.repeat(num_shifts)
        lowest = numbers.new_full((2 * num_columns + SPARE,), len(voxel)).scatter_reduce_(0, column, numbers, "amin")
        rank = (numbers - lowest.index_select(0, column)).view(num_shifts, -1)
        position = position + torch.cat([rank, rank])
    position = torch.where(there, position, voxel)
    order = torch.empty_like(position).scatter_(1, position, voxel.expand_as(position)).int()

    sets: list[ShiftSets | None] = [None, None]
    begin = 0
    for number, shift in enumerate(stage.shifts):
        end = begin + layout.columns[number]
        first = before[begin : end + 1 : layout.columns_in_window[number]] - number * grid.num_voxels
        start, num_sets = _starts(first, stage.config.set_size, stage.room.sets[shift])
        own = slice(number, None, num_shifts)
        sets[shift] = ShiftSets(order[own], position[own].int(), start, num_sets)
        begin = end
    return (rows[0].int(), rows[1].int()), (sets[0], sets[1])


def _starts(first: Tensor, set_size: int, room: int) -> tuple[Tensor, Tensor]:
    """`ShiftSets.set_start` and `num_sets` from the (windows + 1,) int32 number of voxels before each window."""
    count = first.diff()
    sets = (count + (set_size - 1)) // set_size
    up_to = torch.cumsum(sets, 0, dtype=torch.int32)
    number = torch.arange(room + 1, dtype=torch.int32, device=first.device)
    window = torch.searchsorted(up_to, number, right=True).clamp_max(len(count) - 1)
    in_window, own_first, own_count, own_sets = (
        torch.stack([up_to - sets, first[:-1], count, sets]).index_select(1, window).unbind()
    )
    start = own_first + (number - in_window) * own_count // own_sets.clamp_min(1)
    return torch.where(number < up_to[-1:], start, first[-1:]), up_to[-1:]
