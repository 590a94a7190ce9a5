"""Fixed capacities: networks of one size for clouds of every size.

An exported network has room for so many voxels and sets. A smaller cloud is padded: with voxels that no set holds, and
with sets that no voxel reads. Of a larger one the nearest voxels are kept. The number of sets that suffices follows
from the number of voxels, so it never has to be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvt_ros.config import ModelConfig
from dsvt_ros.structures import SetPartition, Voxels, WindowShift


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


def pad_features(features: Tensor, voxels: int) -> Tensor:
    """(V, D) features to (`voxels`, D), with zeros."""
    return F.pad(features, (0, 0, 0, voxels - len(features)))


def pad_partition(partition: SetPartition, capacity: Capacity) -> SetPartition:
    """The same sets in tensors of fixed size and with int32 indices, as exported networks take them.

    Padded sets hold voxel 0 in every slot, the first one unmasked, so that their softmax is defined. Padded voxels read
    slot 0, and nobody reads them.
    """
    first, second = (
        _pad_shift(shift, capacity.voxels, sets) for shift, sets in zip(partition.shifts, capacity.sets, strict=True)
    )
    return SetPartition((first, second))


def _pad_shift(shift: WindowShift, voxels: int, sets: int) -> WindowShift:
    more_sets = sets - shift.set_indices.shape[1]
    more_voxels = voxels - shift.slot_of_voxel.shape[1]
    mask = F.pad(shift.set_mask, (0, 0, 0, more_sets), value=True)
    mask[:, sets - more_sets :, 0] = False
    return WindowShift(
        set_indices=F.pad(shift.set_indices.int(), (0, 0, 0, more_sets)),
        set_mask=mask,
        slot_of_voxel=F.pad(shift.slot_of_voxel.int(), (0, more_voxels)),
        cell_of_voxel=F.pad(shift.cell_of_voxel.int(), (0, more_voxels)),
    )


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
