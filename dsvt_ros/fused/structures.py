"""What flows between the stages of a whole frame.

Tensors have a fixed capacity; how many rows count, only the device knows. Rows beyond a count hold anything, unless a
stage that needs more says so.

Letters as in `dsvt_ros.structures`; here N and V are capacities, S is the capacity of a window shift's sets, and B the
number of clouds. A cell of a grid (nx, ny, nz) has the number ``((batch * nx + x) * ny + y) * nz + z``; voxels are
numbered in the order of their cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsvt_ros.structures import ProposalMaps

if TYPE_CHECKING:
    from torch import Tensor

SEGMENT_POINTS = 8
"""Points of a segment: those of a voxel are dealt out to segments, so that dense voxels do not hold up others."""
OFFSET_SCALE = 2**24
"""Steps of a voxel's extent in which offsets of points are summed: below 1 um for voxels of up to 16 m."""


@dataclass(frozen=True)
class Grid:
    """The occupied cells of one stage's grid.

    Attributes:
        size: Cells in x, y, z.
        voxel_of_cell: (B nx ny nz,) int32, row of the voxel in each cell; -1 where there is none.
        cell_of_voxel: (V,) int32, its inverse.
        num_voxels: (1,) int32, voxels that there are; at most V.
    """

    size: tuple[int, int, int]
    voxel_of_cell: Tensor
    cell_of_voxel: Tensor
    num_voxels: Tensor


@dataclass(frozen=True)
class Segments:
    """The points of every voxel, in segments of `SEGMENT_POINTS`; only the last one of a voxel is not full.

    Which of a voxel's points come first is left to chance: nothing that is made of them depends on it.

    Attributes:
        voxel: (G,) int32, voxel of each segment; those of a voxel follow each other.
        point: (G, SEGMENT_POINTS) int32, point in each slot; -1 where there is none.
        num_segments: (1,) int32; at most G.
        points_in_voxel: (V,) int32.
        offset_sum: (V, 3) int64, sum over the points of a voxel of their offset from its cell's lower corner, in
            `1 / OFFSET_SCALE` of the cell's extent: whole numbers, whose sum is the same in any order.
    """

    voxel: Tensor
    point: Tensor
    num_segments: Tensor
    points_in_voxel: Tensor
    offset_sum: Tensor


@dataclass(frozen=True)
class FusedVoxels:
    """Points and the voxels that they occupy.

    Attributes:
        points: (N, C) float32 in the model's frame, as the network wants them; only those in a segment count.
        grid: The occupied cells.
        segments: Who lies in them.
        num_points: (1,) int32, points inside the range.
        num_dropped: (1,) int32, voxels for which there was no room: those farthest from the model's origin.
    """

    points: Tensor
    grid: Grid
    segments: Segments
    num_points: Tensor
    num_dropped: Tensor


@dataclass(frozen=True)
class ShiftSets:
    """Sets of one window shift. The voxels of a set follow each other in `order`: nobody is in two sets.

    Attributes:
        order: (2, V) int32, voxels sorted by window, inside a window by y, x, z (0) or by x, y, z (1).
        position: (2, V) int32, their inverses: where in `order` each voxel is.
        set_start: (S + 1,) int32, position in `order` where each set begins, and where the last one ends.
        num_sets: (1,) int32; at most S.
    """

    order: Tensor
    position: Tensor
    set_start: Tensor
    num_sets: Tensor


@dataclass(frozen=True)
class FusedStage:
    """What a stage has to know of its voxels.

    Attributes:
        grid: Its voxels.
        cells: For each window shift (V,) int32, position of each voxel inside its window, ``(z * wy + y) * wx + x``.
        sets: For each window shift its sets; None where no block of the stage uses them.
        pooled: (V, P) int32, for each voxel of the *next* stage its voxels in this one, -1 where there is none; None
            for the last stage.
    """

    grid: Grid
    cells: tuple[Tensor, Tensor]
    sets: tuple[ShiftSets | None, ShiftSets | None]
    pooled: Tensor | None


@dataclass(frozen=True)
class PeakMaps:
    """What is computed of CenterHead in every cell.

    Attributes:
        logits: (B, classes, H, W) float16 heatmaps.
        shared: (B, D, H, W) float16, what the other branches start from.
    """

    logits: Tensor
    shared: Tensor


Maps = PeakMaps | ProposalMaps
"""What the dense network gives: of CenterHead or of TransFusionHead."""
