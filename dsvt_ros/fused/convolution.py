"""Convolutions on maps as rows of cells; see `kernels.convolution`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.extents import MIN_EXTENT, power_of_two
from dsvt_ros.fused.launch import MAX_CHUNK, ROWS, blocks_of, descriptor
from dsvt_ros.fused.weights import half


@dataclass(frozen=True)
class BevRows:
    """A BEV map as a row a cell, y after y, with an empty cell after each row and an empty row after each map.

    Attributes:
        rows: (B (H + 1) (W + 1), C) float16.
        height: H, along y.
        width: W, along x.
    """

    rows: Tensor
    height: int
    width: int

    def image(self) -> Tensor:
        """(B, C, H, W) view."""
        maps = self.rows.view(-1, self.height + 1, self.width + 1, self.rows.shape[1])
        return maps[:, : self.height, : self.width].permute(0, 3, 1, 2)


def room_for(channels: int) -> int:
    """Channels in memory: blocks are powers of two, and tensor cores take 16."""
    return max(MIN_EXTENT, power_of_two(channels)) if channels <= MAX_CHUNK else -(-channels // 64) * 64


class FusedConvolution:
    """A convolution, all that follows it, and its launch.

    Attributes:
        taps: Its extent along an axis.
        stride: The same along both axes.
        channels_in: Channels of the input's rows, some of them perhaps unused.
        channels_out: Channels of the output's rows, likewise.
        matrix: (taps * taps * channels in, channels out) float16 weights, taps by y, then x.
        bias: (channels out,) float32.
    """

    def __init__(self, conv: nn.Conv2d, sources: Tensor | None = None) -> None:
        """Take over weights.

        Args:
            conv: 3 by 3 with padding 1, or 1 by 1 or 2 by 2 without; the batch norm folded.
            sources: (channels in,) int64, where each channel lies in the input's rows; None if they lie as they are.

        Raises:
            EngineError: It is none of these, or has weights beyond float16.
        """
        self.taps, self.stride = conv.kernel_size[0], conv.stride[0]
        if conv.padding[0] != (self.taps - 1) // 2:
            raise EngineError(
                f"fused convolutions of {self.taps} by {self.taps} have a padding of {(self.taps - 1) // 2}, "
                f"not {conv.padding[0]}"
            )
        weight = conv.weight.detach()
        self.channels_in = room_for(conv.in_channels) if sources is None else int(sources.max()) + 1
        self.channels_in = room_for(self.channels_in)
        self.channels_out = room_for(conv.out_channels)
        matrix = weight.new_zeros(self.taps**2, self.channels_in, self.channels_out)
        where = torch.arange(conv.in_channels, device=weight.device) if sources is None else sources
        matrix[:, where, : conv.out_channels] = weight.permute(2, 3, 1, 0).flatten(0, 1)
        self.matrix = half(matrix.flatten(0, 1))
        self.bias = weight.new_zeros(self.channels_out)
        if conv.bias is not None:
            self.bias[: conv.out_channels] = conv.bias.detach()

    def __call__(
        self,
        x: BevRows,
        *,
        relu: bool = True,
        residual: BevRows | None = None,
        products: tuple[Tensor, Tensor] | None = None,
        output: Tensor | None = None,
    ) -> BevRows:
        """Convolve to rows of cells.

        Args:
            x: (rows, channels in).
            relu: Whether a ReLU comes last.
            residual: Added before it; only with stride 1.
            products: Likewise, (V, channels out) rows of voxels and the (rows,) int32 voxel of each cell, -1 for none.
            output: (rows, channels out) to write to; None makes a new one.
        """
        from dsvt_ros.kernels import convolution as kernels

        beyond = self.taps - 2 * ((self.taps - 1) // 2)
        height, width = (x.height - beyond) // self.stride + 1, (x.width - beyond) // self.stride + 1
        clouds = x.rows.shape[0] // ((x.height + 1) * (x.width + 1))
        num_rows = clouds * (height + 1) * (width + 1)
        if output is None:
            output = x.rows.new_empty(num_rows, self.channels_out)
        blocks = blocks_of(self.channels_in, self.channels_out, self.matrix.device)
        target = descriptor(output, ROWS, blocks["COLUMNS"])
        if self.stride > 1:
            kernels.convolve_strided[-(-num_rows // ROWS), self.channels_out // blocks["COLUMNS"]](
                x.rows, descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"]), self.bias, target,
                height, width, x.height, x.width, num_rows,
                CIN=self.channels_in, TAPS=self.taps, STRIDE=self.stride, ROWS=ROWS, RELU=relu, **blocks,
            )  # fmt: skip
            return BevRows(output, height, width)
        self._convolve(x, output, target, relu=relu, residual=residual, products=products, classes=0)
        return BevRows(output, height, width)

    def to_maps(self, x: BevRows, classes: int) -> Tensor:
        """Convolve with stride 1 and without a ReLU to contiguous (B, classes, H, W) maps."""
        clouds = x.rows.shape[0] // ((x.height + 1) * (x.width + 1))
        maps = x.rows.new_empty(clouds, classes, x.height, x.width)
        self._convolve(x, x.rows, maps, relu=False, residual=None, products=None, classes=classes)
        return maps

    def _convolve(
        self,
        x: BevRows,
        like: Tensor,
        target: Any,
        *,
        relu: bool,
        residual: BevRows | None,
        products: tuple[Tensor, Tensor] | None,
        classes: int,
    ) -> None:
        from dsvt_ros.kernels import convolution as kernels

        blocks = blocks_of(self.channels_in, self.channels_out, self.matrix.device)
        features, voxel_at = products or (like, like)
        num_rows = x.rows.shape[0]
        kernels.convolve[-(-num_rows // ROWS), self.channels_out // blocks["COLUMNS"]](
            descriptor(x.rows, ROWS, blocks["CHUNK"]), descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"]),
            self.bias, descriptor(like if residual is None else residual.rows, ROWS, blocks["COLUMNS"]),
            features, voxel_at, target, x.height, x.width, num_rows,
            CIN=self.channels_in, TAPS=self.taps, ROWS=ROWS, RELU=relu, PRODUCT_STRIDE=features.stride(0),
            RESIDUAL=2 if products else 1 if residual else 0, CLASSES=classes, **blocks,
        )  # fmt: skip
