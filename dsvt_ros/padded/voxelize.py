"""Points to voxels on tensors of fixed capacity, with all counts on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsvt_ros.capacity import columns_by_distance
from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.constants import constant
from dsvt_ros.fused.structures import Grid
from dsvt_ros.padded.structures import SortedVoxels
from dsvt_ros.preprocess import scale_features


class PaddedVoxelizer:
    """What `preprocess`, `voxelization` and `capacity.keep_nearest` do, for clouds of any size up to a capacity.

    Several clouds share the room for voxels: whatever cloud they are of, the voxels farthest from the model's origin
    are dropped first, and of those as far the ones with the highest cell number.
    """

    def __init__(self, model: ModelConfig, device: torch.device, points: int, voxels: int, clouds: int = 1) -> None:
        """Make tables.

        Args:
            model: Gives the columns, the range and the grid.
            device: Where everything is.
            points: Rows of the tensor that holds the points.
            voxels: Room for the voxels of all clouds.
            clouds: How many clouds that tensor holds.
        """
        self._model, self._voxels, self._clouds = model, voxels, clouds
        self._cells, self._cell_by_distance, self._rank_of_cell = _tables(model, clouds, device)
        self._row = torch.arange(points, dtype=torch.int32, device=device)

    def __call__(self, points: Tensor, ends: Tensor, pose: Tensor, config: PreprocessConfig) -> SortedVoxels:
        """Sort the points into the model's grid; never waits for the device.

        Args:
            points: (N, C) float32, columns as `model.features`, in the sensor's frame.
            ends: (B,) int32, row after each cloud's last point; the first cloud begins in row 0, each of the others
                where the one before it ends. Rows after the last end count for nothing.
            pose: (B, 3, 4) float32, model's frame from sensor's of each cloud.
            config: What is no return, and how columns are scaled.
        """
        moved, key = self._cells_of_points(points, ends, pose, config)
        no_cell = len(self._cells)
        occupied = torch.zeros(no_cell + 1, dtype=torch.bool, device=points.device).scatter_(0, key, True)[:-1]
        grid, num_dropped = self._number_voxels(occupied)
        voxel = torch.cat([grid.voxel_of_cell, constant([-1], grid.voxel_of_cell)]).index_select(0, key)
        voxel, order = torch.sort(torch.where(voxel < 0, self._voxels, voxel), stable=True)
        start = torch.searchsorted(voxel, torch.arange(self._voxels + 1, dtype=torch.int32, device=voxel.device))
        num_points = (key < no_cell).sum(0, keepdim=True, dtype=torch.int32)
        return SortedVoxels(moved.index_select(0, order), voxel.long(), start, grid, num_points, num_dropped)

    def _cells_of_points(
        self, points: Tensor, ends: Tensor, pose: Tensor, config: PreprocessConfig
    ) -> tuple[Tensor, Tensor]:
        """(N, C) points as the network wants them, and (N,) int64 their cells, B nx ny nz for points without one."""
        model = self._model
        nx, ny, nz = model.grid_size
        # Coordinate by coordinate: on a GPU, sums over three neighbouring numbers take far longer.
        xyz = points[:, :3].T.contiguous()
        cloud = torch.searchsorted(ends, self._row, right=True, out_int32=True)
        move = pose.permute(2, 1, 0)  # column, row, cloud
        if self._clouds > 1:
            move = move.index_select(2, cloud.clamp_max(self._clouds - 1))
        moved = move[0] * xyz[0] + move[1] * xyz[1] + move[2] * xyz[2] + move[3]

        minimum, size = constant(model.point_cloud_range[:3], xyz), constant(model.voxel_size, xyz)
        cell = torch.floor((moved - minimum[:, None]) / size[:, None])
        # Of points that are not finite, no coordinate is after they were moved.
        inside = ((cell >= 0) & (cell < constant((nx, ny, nz), cell)[:, None])).all(0)
        inside &= (xyz * xyz).sum(0) >= config.min_range**2
        inside &= cloud < self._clouds
        x, y, z = torch.where(inside, cell, 0).int()
        key = torch.where(inside, ((cloud * nx + x) * ny + y) * nz + z, len(self._cells))

        fill = constant([feature.fill for feature in model.features[3:]], points)
        rest = torch.where(torch.isfinite(points[:, 3:]), points[:, 3:], fill)
        return scale_features(torch.cat([moved.T, rest], 1), model, config), key.long()

    def _number_voxels(self, occupied: Tensor) -> tuple[Grid, Tensor]:
        """The nearest of the occupied cells, as many as there is room for, and how many others there are."""
        by_distance = occupied.index_select(0, self._cell_by_distance)
        count = torch.cumsum(by_distance, 0, dtype=torch.int32)
        kept = (by_distance & (count <= self._voxels)).index_select(0, self._rank_of_cell)
        number = torch.cumsum(kept, 0, dtype=torch.int32)
        num_voxels = number[-1:]
        # Cells that are not kept write to a row behind the others.
        row = torch.where(kept, number - 1, self._voxels).long()
        cell_of_voxel = torch.zeros(self._voxels + 1, dtype=torch.int32, device=kept.device)
        cell_of_voxel = cell_of_voxel.scatter_(0, row, self._cells)[:-1]
        grid = Grid(self._model.grid_size, torch.where(kept, number - 1, -1), cell_of_voxel, num_voxels)
        return grid, count[-1:] - num_voxels


@lru_cache(maxsize=1)  # frames of all sizes share them; each holds those that it uses
def _tables(model: ModelConfig, clouds: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of B clouds (B nx ny nz,) int32 each: the cells by number, the same by distance, and where each is in these."""
    nz = model.grid_size[2]
    columns = columns_by_distance(model, clouds)
    by_distance = (columns[:, None] * nz + torch.arange(nz)).flatten().int().to(device)
    numbers = torch.arange(len(by_distance), dtype=torch.int32, device=device)
    rank = torch.empty_like(numbers)
    rank[by_distance.long()] = numbers
    return numbers, by_distance, rank
