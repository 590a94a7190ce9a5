"""Fixed capacities: networks of one size for clouds of every size.

An exported network has room for so many voxels and sets. A smaller cloud is padded: with voxels that no set holds, and
with sets that no voxel reads. Of a larger one the nearest voxels are kept. The number of sets that suffices follows
from the number of voxels, so it never has to be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsvt_ros.config import ModelConfig
from dsvt_ros.structures import SetPartition, Voxels


@dataclass(frozen=True)
class Capacity:
    """Room of a network for one cloud.

    Attributes:
        voxels: Voxels.
        sets: Sets of each window shift; enough for any arrangement of `voxels` voxels.
    """

    voxels: int
    sets: tuple[int, int]


def capacity_for(model: ModelConfig, voxels: int) -> Capacity:
    """The capacity with room for `voxels` voxels of one cloud.

    A window with n voxels has ceil(n / L) <= (n + L - 1) / L sets of L slots. Over W occupied windows that makes at
    most (V + W (L - 1)) / L, and no more windows can be occupied than there are voxels or windows on the grid.
    """
    backbone = model.backbone_3d
    size = backbone.set_size
    sets = []
    for window, offset in zip(backbone.windows, backbone.offsets, strict=True):
        windows = 1
        for axis, cells in enumerate(model.grid_size):
            # As in set_partition.py: a window as tall as the grid is not shifted in z.
            shift = offset[axis] if axis < 2 or window[axis] < cells else 0
            windows *= (cells - 1 + shift) // window[axis] - shift // window[axis] + 1
        sets.append(max(1, (voxels + min(windows, voxels) * (size - 1)) // size))
    return Capacity(voxels, (sets[0], sets[1]))


def default_voxels(model: ModelConfig) -> int:
    """Voxels that a network is exported for unless told otherwise: three in sixteen columns of the grid.

    Busy scans of dense sensors fill about an eighth. Rounded down to a multiple of 1024 where that leaves some.
    """
    nx, ny, _ = model.grid_size
    voxels = max(1, 3 * nx * ny // 16)
    return voxels // 1024 * 1024 or voxels


def write_padded(source: SetPartition, target: SetPartition) -> None:
    """Copy a partition into tensors of a network's capacity, whose integers may be of another type.

    Padded sets hold voxel 0 in every slot, the first one unmasked, so that their softmax is defined. Padded voxels read
    slot 0, and nobody reads them.
    """
    for shift, room in zip(source.shifts, target.shifts, strict=True):
        sets, voxels = shift.set_indices.shape[1], len(shift.cell_of_voxel)
        room.set_indices[:, :sets].copy_(shift.set_indices)
        room.set_indices[:, sets:].zero_()
        room.set_mask[:, :sets].copy_(shift.set_mask)
        room.set_mask[:, sets:].fill_(True)
        room.set_mask[:, sets:, 0].fill_(False)
        room.slot_of_voxel[:, :voxels].copy_(shift.slot_of_voxel)
        room.slot_of_voxel[:, voxels:].zero_()
        room.cell_of_voxel[:voxels].copy_(shift.cell_of_voxel)
        room.cell_of_voxel[voxels:].zero_()


def keep_nearest(voxels: Voxels, model: ModelConfig, limit: int) -> Voxels:
    """Drop the voxels that lie farthest from the model's origin, until `limit` are left; of equals the last go first.

    Args:
        voxels: Voxels of one cloud.
        model: Gives range and voxel size.
        limit: How many to keep at most.

    Returns:
        The nearest voxels in their old order, with the points in them.
    """
    if len(voxels) <= limit:
        return voxels
    coords = voxels.coords
    size, minimum = model.voxel_size, model.point_cloud_range
    x = (coords[:, 3].double() + 0.5) * size[0] + minimum[0]
    y = (coords[:, 2].double() + 0.5) * size[1] + minimum[1]
    kept = torch.argsort(x * x + y * y, stable=True)[:limit].sort().values
    row_of_voxel = coords.new_full((len(coords),), -1, dtype=torch.int64)
    row_of_voxel[kept] = torch.arange(limit, device=coords.device)
    voxel_of_point = row_of_voxel[voxels.voxel_of_point]
    inside = voxel_of_point >= 0
    return Voxels(voxels.points[inside], voxel_of_point[inside], coords[kept], voxels.batch_size)
