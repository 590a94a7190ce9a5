"""Fixed capacities: networks of one size for clouds of every size.

An exported network has room for so many voxels and sets. A smaller cloud is padded: with voxels that no set holds, and
with sets that no voxel reads. Of a larger one the nearest voxels are kept. The number of sets that suffices follows
from the number of voxels, so it never has to be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsvt_ros.config import Cells, EngineConfig, ModelConfig
from dsvt_ros.structures import SetPartition, Voxels


@dataclass(frozen=True)
class StageCapacity:
    """Room of one stage.

    Attributes:
        voxels: Voxels.
        sets: Sets of each window shift, enough for any arrangement of the voxels; 0 for a shift without sets.
    """

    voxels: int
    sets: tuple[int, int]


@dataclass(frozen=True)
class Capacity:
    """Room of a network.

    Attributes:
        stages: Of each stage; what fits into the first one fits into all.
    """

    stages: tuple[StageCapacity, ...]

    @property
    def voxels(self) -> int:
        """Voxels of the first stage."""
        return self.stages[0].voxels


def capacity_for(model: ModelConfig, voxels: int, clouds: int = 1) -> Capacity:
    """The capacity with room for `voxels` voxels, those of all clouds together."""
    stages: list[StageCapacity] = []
    for stage, grid, shifts in zip(model.backbone_3d.stages, model.stage_grids, model.backbone_3d.shifts, strict=True):
        if stages:
            voxels = min(voxels, clouds * grid[0] * grid[1] * grid[2])
        most = [
            _most_sets(grid, window, offset, clouds, voxels, stage.set_size) if shift in shifts else 0
            for shift, (window, offset) in enumerate(zip(stage.windows, stage.offsets, strict=True))
        ]
        stages.append(StageCapacity(voxels, (most[0], most[1])))
    return Capacity(tuple(stages))


def _most_sets(grid: Cells, window: Cells, offset: Cells, clouds: int, voxels: int, set_size: int) -> int:
    """Sets that so many voxels make at most.

    A window with n voxels has ceil(n / L) <= (n + L - 1) / L sets of L slots. Over W occupied windows that makes at
    most (V + W (L - 1)) / L, and no more windows can be occupied than there are voxels or windows on the grids.
    """
    windows = clouds
    for axis, cells in enumerate(grid):
        # As in set_partition.py: a window as tall as the grid is not shifted in z.
        shift = offset[axis] if axis < 2 or window[axis] < cells else 0
        windows *= (cells - 1 + shift) // window[axis] - shift // window[axis] + 1
    return max(1, (voxels + min(windows, voxels) * (set_size - 1)) // set_size)


def counts_of(partition: SetPartition) -> Capacity:
    """What a cloud needs: its own voxels and sets."""
    stages = []
    for stage in partition.stages:
        first, second = (0 if sets is None else sets.indices.shape[1] for sets in stage.sets)
        stages.append(StageCapacity(len(stage.cells[0]), (first, second)))
    return Capacity(tuple(stages))


def default_voxels(model: ModelConfig) -> int:
    """Voxels that a network is exported for unless told otherwise: three in sixteen columns of the grid, or so.

    Busy scans of dense sensors fill about an eighth, ten sweeps of nuScenes up to a fifth: a model of several sweeps
    gets a quarter. A column of more than one voxel counts twice: those that hold points have 1.4 to 2.2 occupied ones.
    Rounded down to a multiple of 1024 where that leaves some.
    """
    nx, ny, nz = model.grid_size
    sixteenths = 3 if model.sweeps == 1 else 4
    voxels = max(1, sixteenths * nx * ny * min(nz, 2) // 16)
    return voxels // 1024 * 1024 or voxels


def room_for_voxels(model: ModelConfig, config: EngineConfig) -> int:
    """Voxels of a cloud that fused frames have room for."""
    return max(config.profile.voxels, default=0) or default_voxels(model)


def write_padded(source: SetPartition, target: SetPartition) -> None:
    """Copy a partition into tensors of a network's capacity, whose integers may be of another type.

    Padded sets hold voxel 0 in every slot, the first one unmasked, so that their softmax is defined. Padded voxels read
    slot 0, are pooled from nothing, and nobody reads them. Coordinates are not copied: no network reads them.
    """
    for stage, room in zip(source.stages, target.stages, strict=True):
        for cells, cells_room in zip(stage.cells, room.cells, strict=True):
            _write(cells, cells_room, 0, 0)
        for sets, sets_room in zip(stage.sets, room.sets, strict=True):
            if sets is None or sets_room is None:
                continue
            count = sets.indices.shape[1]
            _write(sets.indices, sets_room.indices, 1, 0)
            _write(sets.mask, sets_room.mask, 1, True)
            sets_room.mask[:, count:, 0].fill_(False)
            _write(sets.slot_of_voxel, sets_room.slot_of_voxel, 1, 0)
        if stage.pooling is not None and room.pooling is not None:
            _write(stage.pooling.indices, room.pooling.indices, 0, 0)
            _write(stage.pooling.mask, room.pooling.mask, 0, True)


def _write(values: Tensor, room: Tensor, axis: int, rest: int | bool) -> None:
    """Copy into the first entries along `axis`, and fill the others."""
    count = values.shape[axis]
    room.narrow(axis, 0, count).copy_(values)
    room.narrow(axis, count, room.shape[axis] - count).fill_(rest)


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


def columns_by_distance(model: ModelConfig, clouds: int) -> Tensor:
    """(B nx ny,) int64: columns of the grids of B clouds in the order in which `keep_nearest` keeps their voxels."""
    nx, ny, _ = model.grid_size
    size, minimum = model.voxel_size, model.point_cloud_range
    x = (torch.arange(nx, dtype=torch.float64) + 0.5) * size[0] + minimum[0]
    y = (torch.arange(ny, dtype=torch.float64) + 0.5) * size[1] + minimum[1]
    squared = (x * x)[:, None] + (y * y)[None, :]
    return torch.argsort(squared.flatten().repeat(clouds), stable=True)
