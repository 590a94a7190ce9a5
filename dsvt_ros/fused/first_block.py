"""The residual block that takes voxels to a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.fused.extents import power_of_two
from dsvt_ros.fused.multiply import multiply
from dsvt_ros.fused.structures import Grid
from dsvt_ros.model.bev_backbone import ResidualBlock

GATHER_CELLS = 8
"""That one warp computes (8 measured faster than 16 and 32 on an H200)."""
INDEX_BLOCK = 32
"""Cells along x and y of a program that finds their voxels."""


class FirstBlock:
    """The first residual block: its input is the voxels, and cells without one need no arithmetic.

    Every voxel is multiplied with the weights of all taps of the first convolution, and of the shortcut; then every
    cell sums what the voxels around it have for it.

    Attributes:
        stride: Of the first convolution and the shortcut.
        channels: Of the block's output, a power of two.
        matrix: (at least D, 10 channels) float16 weights: taps of the first convolution by y, then x; the shortcut.
        bias: (channels,) float32 of the first convolution.
        second: The second convolution, with the shortcut's bias in its own.
    """

    def __init__(self, block: ResidualBlock) -> None:
        """Take over the weights of a block with a shortcut, whose batch norms are folded.

        Raises:
            EngineError: The kernels do not take its sizes, or it has weights beyond float16.
        """
        conv, downsample = block.conv1, block.downsample_layer[0]  # type: ignore[index]
        assert isinstance(downsample, nn.Conv2d)
        self.stride = conv.stride[0]
        first, shortcut = FusedConvolution(conv), FusedConvolution(downsample)
        self.second = FusedConvolution(block.conv2)
        self.channels = first.channels_out
        if self.channels & (self.channels - 1):
            raise EngineError(f"fused convolutions take powers of two as first channels, not {conv.out_channels}")
        taps = torch.cat([first.matrix.view(9, -1, self.channels), shortcut.matrix[None]])
        self.matrix = taps.transpose(0, 1).flatten(1).contiguous()
        self.bias = first.bias
        # The shortcut is added where the second convolution adds its own bias.
        self.second.bias = self.second.bias + shortcut.bias

    def __call__(self, features: Tensor, grid: Grid) -> BevRows:
        """(V, D) float16 features of the pillars in `grid` to (rows, channels)."""
        x, products = self.gather(features, grid)
        return self.second(x, products=products)

    def gather(self, features: Tensor, grid: Grid) -> tuple[BevRows, tuple[Tensor, Tensor]]:
        """The first convolution, and the shortcut as `products` for the second.

        Args:
            features: (V, D) float16.
            grid: Their pillars.

        Returns:
            (rows, channels), and `products` as `FusedConvolution` takes them: (V, channels) columns of longer rows, of
            which those of the pillars there are count, and (rows,) int32.

        Raises:
            EngineError: There are more pillars than the kernels can number.
        """
        from dsvt_ros.kernels import first_block as kernels

        width, height, _ = grid.size
        clouds = len(grid.voxel_of_cell) // (width * height)
        num_rows_in = clouds * (height + 1) * (width + 1)
        voxel_at = grid.voxel_of_cell.new_empty(num_rows_in)
        kernels.index_cells[(-(-(width + 1) // INDEX_BLOCK), -(-(height + 1) // INDEX_BLOCK), clouds)](
            grid.voxel_of_cell, voxel_at, height, width, BLOCK=INDEX_BLOCK
        )
        products = multiply(features, self.matrix, grid.num_voxels)
        height_out, width_out = -(-height // self.stride), -(-width // self.stride)
        lines = clouds * (height_out + 1)
        output = features.new_empty(lines * (width_out + 1), self.channels)
        kernels.gather_taps[(lines, -(-(width_out + 1) // GATHER_CELLS))](
            products, voxel_at, self.bias, output, height_out, width_out, height, width, clouds * (height + 1),
            PRODUCT_STRIDE=products.stride(0), STRIDE=self.stride, CELLS=GATHER_CELLS,
            ROOM=power_of_two((GATHER_CELLS - 1) * self.stride + 3), COLUMNS=self.channels, num_warps=1,
        )  # fmt: skip
        center = voxel_at
        if self.stride > 1:
            cells = voxel_at.view(clouds, height + 1, width + 1)[:, : height : self.stride, : width : self.stride]
            center = F.pad(cells, (0, 1, 0, 1), value=-1).flatten()
        return BevRows(output, height_out, width_out), (products[:, 9 * self.channels :], center)
