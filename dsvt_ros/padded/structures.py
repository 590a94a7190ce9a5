"""What flows between the padded stages beside what `dsvt_ros.fused.structures` describes; letters as there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dsvt_ros.fused.structures import Grid


@dataclass(frozen=True)
class SortedVoxels:
    """Points and the voxels that they occupy.

    Attributes:
        points: (N, C) float32 in the model's frame, as the network wants them, voxel after voxel; of those in no voxel,
            which follow, any values.
        voxel_of_point: (N,) int64; V for points in no voxel.
        start: (V + 1,) int64, row where the points of each voxel begin, and where the last one's end.
        grid: The occupied cells; of rows beyond their number, `cell_of_voxel` is 0.
        num_points: (1,) int32, points inside the range.
        num_dropped: (1,) int32, voxels for which there was no room: those farthest from the model's origin.
    """

    points: Tensor
    voxel_of_point: Tensor
    start: Tensor
    grid: Grid
    num_points: Tensor
    num_dropped: Tensor
