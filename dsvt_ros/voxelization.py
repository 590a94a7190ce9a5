"""Points to voxels: which grid cell each point falls into, and the list of occupied cells."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.config import ModelConfig
from dsvt_ros.structures import Voxels


def voxelize(points: Tensor, model: ModelConfig, batch_index: Tensor | None = None) -> Voxels:
    """Sort points into the model's grid; points outside its range are dropped.

    The cell is ``floor((p - minimum) / voxel_size)``, as in the published encoder (DSVT
    ``dynamic_pillar_vfe.py``), whose ordering of voxels by (batch, x, y, z) is kept too. The occupied cells come from
    a flag a cell and a running sum: no sort, and the same result for any order of the points.

    Args:
        points: (N, C) float32, columns as `model.features`, finite, in the model's frame.
        model: Gives range, voxel size and grid.
        batch_index: (N,) int64 cloud of each point; None for a single cloud.

    Returns:
        The voxels; none of them if no point lies inside the range.
    """
    nx, ny, nz = model.grid_size
    minimum = points.new_tensor(model.point_cloud_range[:3])
    cell = torch.floor((points[:, :3] - minimum) / points.new_tensor(model.voxel_size)).long()
    inside = ((cell >= 0) & (cell < cell.new_tensor([nx, ny, nz]))).all(dim=1)
    points, cell = points[inside], cell[inside]
    key = (cell[:, 0] * ny + cell[:, 1]) * nz + cell[:, 2]
    batch_size = 1
    if batch_index is not None:
        batch_size = int(batch_index.max()) + 1 if len(batch_index) else 1
        key += batch_index[inside] * (nx * ny * nz)

    occupied = torch.zeros(batch_size * nx * ny * nz, dtype=torch.bool, device=points.device)
    occupied[key] = True
    voxel_key = occupied.nonzero().squeeze(1)
    voxel_of_point = (torch.cumsum(occupied, 0) - 1)[key]

    xyz = voxel_key % (nx * ny * nz)
    coords = torch.stack([voxel_key // (nx * ny * nz), xyz % nz, xyz // nz % ny, xyz // (ny * nz)], dim=1)
    return Voxels(points, voxel_of_point, coords.int(), batch_size)
