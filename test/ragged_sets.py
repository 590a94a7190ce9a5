"""Fused stages as the tensors of `dsvt_ros.structures` on the CPU, and back; slow and plain."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from fused_fixtures import DEVICE

from dsvt_ros.config import ModelConfig, StageConfig
from dsvt_ros.fused.structures import FusedStage, Grid, ShiftSets
from dsvt_ros.structures import Pooling, SetPartition, StagePartition, VoxelSets


def grid_from_coords(coords: torch.Tensor, size: tuple[int, int, int], clouds: int, room: int) -> Grid:
    """Occupied cells, with room for so many, on `DEVICE`; `coords` are (V, 4) ``(batch, z, y, x)`` in cell order."""
    nx, ny, nz = size
    batch, z, y, x = coords.long().unbind(1)
    cell = (((batch * nx + x) * ny + y) * nz + z).to(DEVICE)
    voxel_of_cell = torch.full((clouds * nx * ny * nz,), -1, dtype=torch.int32, device=DEVICE)
    voxel_of_cell[cell] = torch.arange(len(cell), dtype=torch.int32, device=DEVICE)
    # Rows beyond the count hold anything, such as the last cell once more.
    cell_of_voxel = torch.full((room,), int(cell[-1]) if len(cell) else 0, dtype=torch.int32, device=DEVICE)
    cell_of_voxel[: len(cell)] = cell
    return Grid(size, voxel_of_cell, cell_of_voxel, torch.tensor([len(cell)], dtype=torch.int32, device=DEVICE))


def coords_from_grid(grid: Grid) -> torch.Tensor:
    """(V, 4) int32 ``(batch, z, y, x)`` of the voxels that there are."""
    nx, ny, nz = grid.size
    cell = grid.cell_of_voxel[: int(grid.num_voxels)].long().cpu()
    return torch.stack([cell // (nx * ny * nz), cell % nz, cell // nz % ny, cell // (nz * ny) % nx], 1).int()


def partition_from_fused(stages: tuple[FusedStage, ...], model: ModelConfig) -> SetPartition:
    """What `partition_sets` gives for the same voxels."""
    found = []
    for number, (stage, described) in enumerate(zip(stages, model.backbone_3d.stages, strict=True)):
        count = int(stage.grid.num_voxels)
        cells = [cells[:count].long().cpu() for cells in stage.cells]
        sets = [
            None if own is None else _voxel_sets(own, stage.grid, described, shift)
            for shift, own in enumerate(stage.sets)
        ]
        pooling = None
        if stage.pooled is not None:
            pooled = stage.pooled[: int(stages[number + 1].grid.num_voxels)].long().cpu()
            pooling = Pooling(pooled.clamp(min=0), pooled < 0)
        found.append(StagePartition((cells[0], cells[1]), (sets[0], sets[1]), pooling))
    return SetPartition(tuple(found), coords_from_grid(stages[-1].grid))


def _voxel_sets(sets: ShiftSets, grid: Grid, described: StageConfig, shift: int) -> VoxelSets:
    count, num_sets = int(grid.num_voxels), int(sets.num_sets)
    order = sets.order[:, :count].long().cpu()
    start = sets.set_start[: num_sets + 1].tolist()
    rows = []
    for first, last in _sets_of_windows(order[0, start[:-1]], coords_from_grid(grid), grid.size, described, shift):
        slots = (last - first) * described.set_size
        rows.append(start[first] + torch.arange(slots) * (start[last] - start[first]) // slots)
    row = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])
    indices = order[:, row].view(2, num_sets, described.set_size)
    mask = torch.zeros_like(indices, dtype=torch.bool)
    mask[:, :, 1:] = indices[:, :, 1:] == indices[:, :, :-1]
    slot_of_voxel = torch.full((2, count), -1)
    for own_slots, voxel, masked in zip(slot_of_voxel, indices.flatten(1), mask.flatten(1), strict=True):
        slot = torch.nonzero(~masked)[:, 0]
        own_slots[voxel[slot]] = slot
    return VoxelSets(indices, mask, slot_of_voxel)


def _sets_of_windows(
    voxel: torch.Tensor, coords: torch.Tensor, size: tuple[int, int, int], described: StageConfig, shift: int
) -> list[tuple[int, int]]:
    """First set of each window and the one after its last, from a voxel of each set."""
    window, offset = described.windows[shift], described.offsets[shift]
    batch, z, y, x = coords[voxel].numpy().T
    z = z + (offset[2] if window[2] < size[2] else 0)
    windows = np.stack([batch, (x + offset[0]) // window[0], (y + offset[1]) // window[1], z // window[2]], 1)
    changes = np.flatnonzero((windows[1:] != windows[:-1]).any(1)) + 1
    edges = [0, *changes.tolist(), len(windows)] if len(windows) else [0]
    return list(pairwise(edges))
