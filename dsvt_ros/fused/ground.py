"""The height of the ground, found within a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros import ground
from dsvt_ros.config import ModelConfig, PreprocessConfig

POINT_ROWS = 256
"""Points of a program."""
CELL_ROWS = 16
"""Cells of a program."""
PADDED_CELLS, PADDED_LAYERS, PADDED_PLANES = 4096, 128, 128
"""Blocks have powers of two as extents."""
WARPS = 8
"""Of a program that sees all cells."""


class GroundFinder:
    """What `ground.ground_height` does, for clouds of any size up to a capacity, and lifts their poses by it.

    The counters that a call needs are as before when its kernels are done, so calls must follow each other on one
    stream. They launch on the current CUDA device, which must be that of the tensors.
    """

    def __init__(self, model: ModelConfig, device: torch.device, points: int, clouds: int = 1) -> None:
        """Make tables and counters.

        Args:
            model: Says where the ground is in its frame.
            device: Where everything is.
            points: Rows of the tensor that holds the points.
            clouds: How many clouds that tensor holds.
        """
        from dsvt_ros.kernels import ground as kernels

        self._ground_z = model.ground_z
        self._points, self._clouds = points, clouds
        self._tables = ground.ground_tables(device)
        counts = torch.zeros(clouds, ground.NUM_CELLS, ground.NUM_LAYERS, dtype=torch.int32, device=device)
        self._counts, self._lowest = counts, torch.full_like(counts, kernels.NO_RETURN.value)

    def __call__(self, points: Tensor, ends: Tensor, seeks: Tensor, poses: Tensor, config: PreprocessConfig) -> None:
        """Write into `poses` at what height the sensors are; never waits for the device.

        Repeated calls give the same bytes, in whatever order the points are.

        Args:
            points: (N, C) float32, contiguous, x, y, z first, in the sensor's frame.
            ends: (B,) int32, row after each cloud's last point; the first cloud begins in row 0, each of the others
                where the one before it ends. Rows after the last end are not read.
            seeks: (B,) int32, 0 for clouds whose ground nobody wants.
            poses: (B, 3, 4) float32, model's frame from sensor's of each cloud. Where it is wanted, the z of the
                translation becomes the one that puts the ground where the model has it.
            config: What is no return.
        """
        from dsvt_ros.kernels import ground as kernels

        assert points.shape[0] == self._points
        assert points.is_contiguous()
        assert ends.shape == seeks.shape == (self._clouds,)
        assert poses.shape == (self._clouds, 3, 4)
        clouds, tables = self._clouds, self._tables
        num_planes = len(tables.weights)
        low = torch.empty(clouds, ground.NUM_CELLS, device=points.device)
        scores = torch.empty(clouds, num_planes, device=points.device)
        borders = torch.empty_like(scores, dtype=torch.int32)

        exact = {"enable_fp_fusion": False}  # layers and cells depend on every rounding
        layers = {"BOTTOM": ground.LOWEST_M, "LAYER": ground.LAYER_M}
        cells = {"CELLS": ground.NUM_CELLS, "PADDED_CELLS": PADDED_CELLS}
        kernels.count_returns[-(-self._points // POINT_ROWS), clouds](
            points, ends, seeks, tables.rings, tables.tangents, self._counts, self._lowest, self._points,
            config.min_range**2,
            COLUMNS=points.shape[1],
            RINGS=ground.NUM_RINGS,
            OCTANT=ground.SECTORS_OF_OCTANT,
            LAYERS=ground.NUM_LAYERS,
            ROWS=POINT_ROWS,
            **layers,
            **exact,
        )  # fmt: skip
        kernels.find_low_returns[-(-ground.NUM_CELLS // CELL_ROWS), clouds](
            self._counts, self._lowest, seeks, low,
            CELLS=ground.NUM_CELLS,
            LAYERS=ground.NUM_LAYERS,
            PADDED_LAYERS=PADDED_LAYERS,
            BELOW=ground.BELOW,
            BLOCK=CELL_ROWS,
        )  # fmt: skip
        kernels.vote[num_planes, clouds](
            low, seeks, tables.x, tables.y, tables.slopes, tables.weights, scores, borders, num_planes,
            LAYERS=ground.NUM_LAYERS,
            PADDED_LAYERS=PADDED_LAYERS,
            num_warps=WARPS,
            **cells,
            **layers,
            **exact,
        )  # fmt: skip
        kernels.place_on_ground[1, clouds](
            low, seeks, tables.x, tables.y, tables.slopes, scores, borders, poses, self._ground_z, num_planes,
            PADDED_PLANES=PADDED_PLANES,
            num_warps=WARPS,
            **cells,
            **layers,
            **exact,
        )  # fmt: skip
