"""Voxels to windows to sets in a few kernels, for all stages; `dsvt_ros.set_partition` says what they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dsvt_ros.capacity import StageCapacity, capacity_for
from dsvt_ros.config import Cells, ModelConfig, StageConfig
from dsvt_ros.fused.extents import power_of_two
from dsvt_ros.fused.structures import FusedStage, Grid, ShiftSets

Columns = tuple[Tensor | None, Tensor | None]
"""For each window shift, where its columns begin and end; None or empty where cells are columns."""
ALIGNMENT = 4
"""Integers in 16 bytes, on which tensors begin."""


class FusedPartition:
    """Splits the voxels of each window into sets, for all stages, without the host waiting for numbers of them.

    Args:
        model: Grid, windows, offsets and set sizes.
        device: Where the voxels are.
        voxels: Room for voxels in the first stage, those of all clouds together.
        clouds: Number of clouds.
    """

    def __init__(self, model: ModelConfig, device: torch.device, voxels: int, clouds: int = 1) -> None:
        self._device = device
        stages = model.backbone_3d.stages
        self._layouts = tuple(
            _lay_out(stage, size, shifts, room, clouds)
            for stage, size, shifts, room in zip(
                stages,
                model.stage_grids,
                model.backbone_3d.shifts,
                capacity_for(model, voxels, clouds).stages,
                strict=True,
            )
        )

    def __call__(self, grid: Grid) -> tuple[FusedStage, ...]:
        """Partition the occupied cells of the first stage's grid; what it returns is new each time."""
        empty = self._empty_tables()
        stages = []
        for layout, following in pairwise(self._layouts):
            columns = (next(empty), next(empty))
            target = Grid(following.size, next(empty), self._integers(following.voxels), self._integers(1))
            pooled_in_block = self._find_columns(layout, grid, columns)
            cells, sets = self._partition(layout, grid, columns)
            stages.append(FusedStage(grid, cells, sets, self._pool(layout, grid, pooled_in_block, target)))
            grid = target
        cells, sets = self._partition(self._layouts[-1], grid, (None, None))
        return (*stages, FusedStage(grid, cells, sets, None))

    def _empty_tables(self) -> Iterator[Tensor]:
        """What kernels write only where there are voxels, in one allocation, filled with -1.

        For each stage but the last one the columns of both shifts, and the voxels of the next grid's cells.
        """
        sizes = [
            size
            for layout, following in pairwise(self._layouts)
            for size in (2 * layout.num_columns[0], 2 * layout.num_columns[1], following.cells)
        ]
        aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        tables = torch.full((sum(aligned),), -1, dtype=torch.int32, device=self._device)
        starts = accumulate(aligned, initial=0)
        return (tables[start : start + size] for start, size in zip(starts, sizes, strict=False))

    def _find_columns(self, layout: _Layout, grid: Grid, columns: Columns) -> Tensor:
        """Write the columns; gives for each block of voxels how many of the next stage begin in it."""
        from dsvt_ros.kernels import set_partition as kernels

        pooled_in_block = self._integers(layout.blocks)
        kernels.find_columns[layout.blocks,](
            grid.cell_of_voxel, grid.num_voxels, *columns, pooled_in_block,
            SIZE=layout.size,
            WINDOW=layout.window,
            OFFSET=layout.offset,
            NUM_ALONG=layout.num_along,
            NUM_COLUMNS=layout.num_columns,
            STRIDE=layout.stride,
        )  # fmt: skip
        return pooled_in_block

    def _partition(
        self, layout: _Layout, grid: Grid, columns: Columns
    ) -> tuple[tuple[Tensor, Tensor], tuple[ShiftSets | None, ShiftSets | None]]:
        """Cells and sets for both window shifts."""
        from dsvt_ros.kernels import set_partition as kernels

        described = {
            "SIZE": layout.size,
            "WINDOW": layout.window,
            "OFFSET": layout.offset,
            "NUM_ALONG": layout.num_along,
            "NUM_WINDOWS": layout.num_windows,
            "NUM_COLUMNS": layout.num_columns,
            "TILE": layout.tile,
        }
        num_windows = sum(layout.num_windows)
        voxels_in_window = self._integers(num_windows)
        cells = (self._integers(layout.voxels), self._integers(layout.voxels))
        kernels.count_windows[num_windows + layout.blocks,](
            grid.voxel_of_cell, grid.cell_of_voxel, grid.num_voxels, *columns, voxels_in_window, *cells, **described
        )
        sets = (self._room_for_sets(layout, 0), self._room_for_sets(layout, 1))
        written = [
            (None,) * 4 if own is None else (own.order, own.position, own.set_start, own.num_sets) for own in sets
        ]
        kernels.write_sets[num_windows,](
            grid.voxel_of_cell, *columns, voxels_in_window, *written[0], *written[1], layout.voxels,
            **described,
            SET_SIZE=layout.set_size,
            MOST_SETS=layout.most_sets,
        )  # fmt: skip
        return cells, sets

    def _room_for_sets(self, layout: _Layout, shift: int) -> ShiftSets | None:
        if layout.num_windows[shift] == 0:
            return None
        order, position = self._integers(2, layout.voxels), self._integers(2, layout.voxels)
        return ShiftSets(order, position, self._integers(layout.sets[shift] + 1), self._integers(1))

    def _pool(self, layout: _Layout, grid: Grid, pooled_in_block: Tensor, target: Grid) -> Tensor:
        """Write the next stage's grid; gives the voxels in each slot of its voxels."""
        from dsvt_ros.kernels import set_partition as kernels

        pooled = self._integers(len(target.cell_of_voxel), layout.stride)
        kernels.pool_voxels[layout.blocks,](
            grid.voxel_of_cell, grid.cell_of_voxel, grid.num_voxels, pooled_in_block,
            target.voxel_of_cell, target.cell_of_voxel, target.num_voxels, pooled,
            SIZE=layout.size,
            STRIDE=layout.stride,
            BLOCKS=layout.blocks,
        )  # fmt: skip
        return pooled

    def _integers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self._device)


Pair = tuple[int, int]


@dataclass(frozen=True)
class _Layout:
    """Numbers of a stage that kernels are compiled for; pairs are for the two window shifts.

    Attributes:
        size: Cells of the grid in x, y, z.
        cells: Cells of all clouds.
        window: Extents of a window in x, y, z, cells.
        offset: What is added to the coordinates of cells.
        num_along: Windows in x, y, z.
        num_windows: Windows of all clouds; 0 where no block uses them.
        num_columns: Columns of all clouds; 0 where nobody needs them.
        tile: Columns of a window in x and y, as a block's extents: powers of two.
        set_size: Slots of a set.
        most_sets: Sets of a full window.
        stride: Voxels along z that make one of the next stage.
        voxels: Room for voxels.
        sets: Room for sets.
        blocks: Blocks of voxels.
    """

    size: Cells
    cells: int
    window: tuple[Cells, Cells]
    offset: tuple[Cells, Cells]
    num_along: tuple[Cells, Cells]
    num_windows: Pair
    num_columns: Pair
    tile: tuple[Pair, Pair]
    set_size: int
    most_sets: Pair
    stride: int
    voxels: int
    sets: Pair
    blocks: int


def _lay_out(stage: StageConfig, size: Cells, shifts: tuple[int, ...], room: StageCapacity, clouds: int) -> _Layout:
    from dsvt_ros.kernels.set_partition import VOXELS

    offsets, num_along, num_windows, num_columns, tiles, most_sets = [], [], [], [], [], []
    for shift, (window, offset) in enumerate(zip(stage.windows, stage.offsets, strict=True)):
        # A window as tall as the grid is never shifted in z: there is nothing to pair it with.
        x, y, z = offset[0], offset[1], offset[2] if window[2] < size[2] else 0
        along = [(cells - 1 + low) // extent + 1 for cells, low, extent in zip(size, (x, y, z), window, strict=True)]
        offsets.append((x, y, z))
        num_along.append((along[0], along[1], along[2]))
        num_windows.append(clouds * math.prod(along) if shift in shifts else 0)
        num_columns.append(clouds * size[0] * size[1] * along[2] if shift in shifts and size[2] > 1 else 0)
        tiles.append((power_of_two(window[0]), power_of_two(window[1])))
        most_sets.append(-(-math.prod(window) // stage.set_size))
    return _Layout(
        size,
        clouds * math.prod(size),
        stage.windows,
        (offsets[0], offsets[1]),
        (num_along[0], num_along[1]),
        (num_windows[0], num_windows[1]),
        (num_columns[0], num_columns[1]),
        (tiles[0], tiles[1]),
        stage.set_size,
        (most_sets[0], most_sets[1]),
        stage.pool_z,
        room.voxels,
        room.sets,
        blocks=-(-room.voxels // VOXELS.value),
    )
