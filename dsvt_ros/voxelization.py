"""Points to voxels: which grid cell each point falls into, and the list of occupied cells."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.config import ModelConfig
from dsvt_ros.constants import constant
from dsvt_ros.structures import Voxels


def voxelize(points: Tensor, model: ModelConfig, batch_index: Tensor | None = None) -> Voxels:
    """Sort points into the model's grid; points outside its range are dropped.

    The cell is ``floor((p - minimum) / voxel_size)``, as in the published encoder (DSVT
    ``dynamic_pillar_vfe.py``), whose ordering of voxels by (batch, x, y, z) is kept too. The occupied cells come from
    a flag a cell: no sort, and the same result for any order of the points.

    Args:
        points: (N, C) float32, columns as `model.features`, finite, in the model's frame.
        model: Gives range, voxel size and grid.
        batch_index: (N,) int64 cloud of each point; None for a single cloud.

    Returns:
        The voxels; none of them if no point lies inside the range.
    """
    nx, ny, nz = model.grid_size
    minimum, size = constant(model.point_cloud_range[:3], points), constant(model.voxel_size, points)
    cell = torch.floor((points[:, :3] - minimum) / size).long()
    inside = ((cell >= 0) & (cell < constant((nx, ny, nz), cell))).all(dim=1).nonzero().squeeze(1)
    points, cell = points.index_select(0, inside), cell.index_select(0, inside)
    key = (cell[:, 0] * ny + cell[:, 1]) * nz + cell[:, 2]
    batch_size = 1
    if batch_index is not None:
        batch_size = int(batch_index.max()) + 1 if len(batch_index) else 1
        key += batch_index[inside] * (nx * ny * nz)

    occupied = torch.zeros(batch_size * nx * ny * nz, dtype=torch.bool, device=points.device)
    occupied.scatter_(0, key, True)
    voxel_key = occupied.nonzero().squeeze(1)
    voxel_of_cell = torch.empty_like(occupied, dtype=torch.int64)  # only occupied cells are written and read
    voxel_of_cell.scatter_(0, voxel_key, torch.arange(len(voxel_key), device=points.device))
    voxel_of_point = voxel_of_cell.index_select(0, key)

    xyz = voxel_key % (nx * ny * nz)
    coords = torch.stack([voxel_key // (nx * ny * nz), xyz % nz, xyz // nz % ny, xyz // (ny * nz)], dim=1)
    return Voxels(points, voxel_of_point, coords.int(), batch_size)
