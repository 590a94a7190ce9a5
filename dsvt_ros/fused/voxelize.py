"""Points to voxels in a few kernels, with all counts on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.capacity import columns_by_distance
from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.fused.extents import power_of_two
from dsvt_ros.fused.structures import OFFSET_SCALE, SEGMENT_POINTS, FusedVoxels, Grid, Segments

WARP_THREADS = 32
"""Threads of a warp, on every NVIDIA GPU."""
POINT_ROWS = 256
"""Points of a program, one a thread: with more, what is loaded side by side would be exchanged between threads."""
SEGMENT_ROWS = 128
"""Segments of a program."""
COLUMN_ROWS = 256
"""Columns of a program."""
SMALL_GRID = 1 << 20
SMALL_BLOCK, LARGE_BLOCK = 1024, 4096
"""Cells of a program, for grids of up to so many cells and for others: each program adds up what is before it."""
WARP_CELLS = 256
PREFIX_STEP = 1024
"""Blocks of cells that are added up at once."""


class Voxelizer:
    """What `preprocess`, `voxelization` and `capacity.keep_nearest` do, for clouds of any size up to a capacity.

    Several clouds share the room for voxels: whatever cloud they are of, the voxels farthest from the model's origin
    are dropped first, and of those as far the ones with the highest cell number.

    The counters that a call needs are zero again when its kernels are done, so calls must follow each other on one
    stream. They launch on the current CUDA device, which must be that of the tensors.
    """

    def __init__(self, model: ModelConfig, device: torch.device, points: int, voxels: int, clouds: int = 1) -> None:
        """Make tables and counters.

        Args:
            model: Gives the columns, the range and the grid.
            device: Where everything is.
            points: Rows of the tensor that holds the points.
            voxels: Room for the voxels of all clouds.
            clouds: How many clouds that tensor holds.
        """
        self._model = model
        self._points, self._voxels, self._clouds = points, voxels, clouds
        nx, ny, nz = model.grid_size
        self._num_columns = clouds * nx * ny
        self._num_cells = self._num_columns * nz
        self._block = SMALL_BLOCK if self._num_cells <= SMALL_GRID else LARGE_BLOCK
        self._blocks = -(-self._num_cells // self._block)

        self._limits = torch.tensor([model.point_cloud_range[:3], model.voxel_size], device=device)
        self._fill = torch.tensor([feature.fill for feature in model.features], device=device)
        self._column_at = columns_by_distance(model, clouds).int().to(device)
        self._position_of_column = torch.empty_like(self._column_at)
        self._position_of_column[self._column_at.long()] = torch.arange(
            self._num_columns, dtype=torch.int32, device=device
        )
        self._points_in_cell = torch.zeros(self._num_cells, dtype=torch.int32, device=device)
        self._totals = torch.zeros(2, dtype=torch.int32, device=device)

    def __call__(self, points: Tensor, ends: Tensor, pose: Tensor, config: PreprocessConfig) -> FusedVoxels:
        """Sort the points into the model's grid; never waits for the device.

        Args:
            points: (N, C) float32, contiguous, columns as `model.features`, in the sensor's frame.
            ends: (B,) int32, row after each cloud's last point; the first cloud begins in row 0, each of the others
                where the one before it ends. Rows after the last end are not read.
            pose: (B, 3, 4) float32, model's frame from sensor's of each cloud.
            config: What is no return, and how columns are scaled.
        """
        from dsvt_ros.kernels import voxelization as kernels

        model = self._model
        columns = len(model.features)
        nx, ny, nz = model.grid_size
        num_points, room = self._points, self._voxels
        assert points.shape == (num_points, columns)
        assert points.is_contiguous()
        assert ends.shape == (self._clouds,)
        assert pose.shape == (self._clouds, 3, 4)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=points.device)

        moved = torch.empty_like(points)
        grid = Grid((nx, ny, nz), empty(self._num_cells), empty(room), empty(1))
        num_segments = num_points // SEGMENT_POINTS + room  # voxel by voxel at most (n + SEGMENT_POINTS - 1) / them
        segments = Segments(
            voxel=empty(num_segments),
            point=empty(num_segments, SEGMENT_POINTS),
            num_segments=empty(1),
            points_in_voxel=empty(room),
            offset_sum=empty(room, 3, dtype=torch.int64),
        )
        voxels = FusedVoxels(moved, grid, segments, num_points=empty(1), num_dropped=empty(1))
        cell_of_point, rank_of_point, segment_start = empty(num_points), empty(num_points), empty(room)
        column_blocks = -(-self._num_columns // COLUMN_ROWS)
        occupied, column_sums, block_sums = empty(self._num_columns), empty(column_blocks), empty(2, self._blocks)

        point_programs = -(-num_points // POINT_ROWS)
        sizes = {"NX": nx, "NY": ny, "NZ": nz}
        cell_blocks = {"BLOCK": self._block, "BLOCKS": self._blocks, "SEGMENT": SEGMENT_POINTS}
        by_columns = {"NZ": nz, "PADDED_NZ": power_of_two(nz), "COLUMNS": COLUMN_ROWS}
        warps = self._block // WARP_CELLS
        names = model.feature_names
        tanh = sum(1 << i for i, feature in enumerate(model.features) if feature.scale == "tanh")
        kernels.place_points[(point_programs,)](
            points, ends, pose, self._limits, self._fill, moved, cell_of_point, rank_of_point,
            self._points_in_cell, self._totals, num_points, config.min_range**2,
            config.intensity_scale if config.scale_features else 1.0,
            CLOUDS=self._clouds,
            COLUMNS=columns,
            INTENSITY=names.index("intensity") if "intensity" in names else -1,
            TANH=tanh if config.scale_features else 0,
            ROWS=POINT_ROWS,
            num_warps=POINT_ROWS // WARP_THREADS,
            enable_fp_fusion=False,  # a cell depends on every rounding
            **sizes,
        )  # fmt: skip
        kernels.count_columns[(column_blocks,)](
            self._points_in_cell, self._totals, self._column_at, occupied, column_sums, room, self._num_columns,
            **by_columns,
        )  # fmt: skip
        kernels.count_blocks[(self._blocks,)](
            self._points_in_cell, block_sums, self._totals, self._column_at, self._position_of_column,
            occupied, column_sums, room, self._num_columns, self._num_cells,
            COLUMN_BLOCKS=power_of_two(column_blocks),
            num_warps=warps,
            **by_columns,
            **cell_blocks,
        )  # fmt: skip
        kernels.number_voxels[(self._blocks,)](
            self._points_in_cell, block_sums, self._totals, grid.voxel_of_cell, grid.cell_of_voxel,
            segments.points_in_voxel, segment_start, segments.offset_sum, segments.point, grid.num_voxels,
            segments.num_segments, voxels.num_points, voxels.num_dropped, room, self._num_cells,
            STEP=PREFIX_STEP,
            num_warps=warps,
            **cell_blocks,
        )  # fmt: skip
        kernels.fill_segments[(point_programs,)](
            ends, cell_of_point, rank_of_point, grid.voxel_of_cell, segment_start, segments.voxel, segments.point,
            self._points_in_cell, self._totals, num_points,
            CLOUDS=self._clouds,
            SEGMENT=SEGMENT_POINTS,
            ROWS=POINT_ROWS,
            num_warps=POINT_ROWS // WARP_THREADS,
        )  # fmt: skip
        kernels.sum_offsets[(-(-num_segments // SEGMENT_ROWS),)](
            moved, self._limits, grid.cell_of_voxel, segments.points_in_voxel, segments.voxel, segments.point,
            segments.num_segments, segments.offset_sum,
            COLUMNS=columns,
            SEGMENT=SEGMENT_POINTS,
            SCALE=OFFSET_SCALE,
            ROWS=SEGMENT_ROWS,
            **sizes,
        )  # fmt: skip
        return voxels
