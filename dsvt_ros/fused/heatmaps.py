"""CenterHead's convolutions from the map to its heatmaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.fused.extents import power_of_two
from dsvt_ros.fused.launch import check_size, is_hopper
from dsvt_ros.fused.tiles import tiles_of

HOPPER_HEAD_CHANNELS = 64
"""Of maps that the kernel for Hopper GPUs writes."""
HOPPER_PRODUCTS = 64
"""Room for what a cell has for its neighbours, a number for each tap and class."""


class FusedHeatmaps:
    """CenterHead's shared convolution and the heatmaps of all its groups."""

    def __init__(self, shared: nn.Conv2d, hidden: nn.Conv2d, output: nn.Conv2d, sources: Tensor, classes: int) -> None:
        """Take over weights; `sources` as for `FusedConvolution`, and the first `classes` channels are wanted."""
        self._shared: FusedConvolution | HopperHeadConvolution = FusedConvolution(shared, sources)
        if HopperHeadConvolution.take(self._shared):
            self._shared = HopperHeadConvolution(self._shared)
        self._hidden, self._output = FusedConvolution(hidden), FusedConvolution(output)
        self._hopper: HopperHeatmaps | None = None
        if HopperHeatmaps.take(self._hidden, classes):
            self._hopper = HopperHeatmaps(self._hidden, self._output, classes)
        self._channels, self._classes = shared.out_channels, classes

    def __call__(self, bev: BevRows) -> tuple[Tensor, Tensor]:
        """Rows to logits (B, classes, H, W), contiguous, and the shared map (B, C, H, W), channels last; float16."""
        shared = self._shared(bev)
        if self._hopper is None:
            logits = self._output.to_maps(self._hidden(shared), self._classes)
        else:
            logits = self._hopper(shared)
        return logits, shared.image()[:, : self._channels]


class HopperHeadConvolution:
    """A 3 by 3 convolution with ReLU to few channels, on Hopper GPUs."""

    def __init__(self, convolution: FusedConvolution) -> None:
        """Take over weights."""
        self._weights, self._bias = convolution.matrix.T.contiguous(), convolution.bias
        self._channels_in = convolution.channels_in
        device = self._bias.device
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count

    @staticmethod
    def take(convolution: FusedConvolution) -> bool:
        """Whether the kernel takes a convolution on its device."""
        sizes = (convolution.taps, convolution.stride, convolution.channels_out) == (3, 1, HOPPER_HEAD_CHANNELS)
        return is_hopper(convolution.bias.device) and sizes and convolution.channels_in % HOPPER_HEAD_CHANNELS == 0

    def __call__(self, x: BevRows) -> BevRows:
        """(rows, channels in) to (rows, 64)."""
        output = BevRows(x.rows.new_empty(x.rows.shape[0], HOPPER_HEAD_CHANNELS), x.height, x.width)
        self._launch(x, output, self._weights, output.rows, 0)
        return output

    def multiply(self, x: BevRows, taps: Tensor, count: int) -> Tensor:
        """What cells have for their neighbours: the result times the first `count` rows of `taps` (64, 64).

        Returns:
            (tiles, count, cells of a tile) float32.
        """
        from dsvt_ros.kernels.tiles import TALL, WIDE

        products = self._bias.new_empty(math.prod(tiles_of(x)), count, TALL.value * WIDE.value)
        check_size(products.flatten(1))
        self._launch(x, x, taps, products, count)
        return products

    def _launch(self, x: BevRows, output: BevRows, taps: Tensor, products: Tensor, count: int) -> None:
        from dsvt_ros.kernels import hopper_head as kernels
        from dsvt_ros.kernels.hopper_ring import MAX_REGISTERS, NUM_WARPS

        check_size(x.rows)
        num_tiles = math.prod(tiles_of(x))
        # A program without a tile would end while what it begins with, the taps, is still on its way.
        kernels.convolve_tiles[(min(self._programs, num_tiles),)](
            kernels.map_descriptor(x.rows, x.height, x.width), kernels.margin_descriptor(x.rows, x.height, x.width),
            kernels.weight_descriptor(self._weights), self._bias,
            kernels.map_descriptor(output.rows, x.height, x.width),
            kernels.weight_descriptor(taps), products, x.height, x.width, num_tiles,
            CIN=self._channels_in, PRODUCTS=count, BOXES=kernels.BOXES_TO_PRODUCTS if count else kernels.BOXES_TO_ROWS,
            num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


class HopperHeatmaps:
    """The two convolutions from the shared map to heatmaps, on Hopper GPUs.

    The result of the first is never written: each cell is multiplied with the weights of all taps of the second one;
    then every cell sums what the cells around it have for it.
    """

    def __init__(self, hidden: FusedConvolution, output: FusedConvolution, classes: int) -> None:
        """Take over weights of both, of the second those of the first `classes` channels."""
        self._hidden, self._bias, self._classes = HopperHeadConvolution(hidden), output.bias, classes
        self._taps = output.matrix.new_zeros(HOPPER_PRODUCTS, HOPPER_HEAD_CHANNELS)
        taps = output.matrix.view(9, HOPPER_HEAD_CHANNELS, -1)[..., :classes]
        self._taps[: 9 * classes] = taps.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def take(hidden: FusedConvolution, classes: int) -> bool:
        """Whether the kernels take a first convolution on its device, and so many classes."""
        narrow = hidden.channels_in == HOPPER_HEAD_CHANNELS
        return narrow and HopperHeadConvolution.take(hidden) and 9 * classes <= HOPPER_PRODUCTS

    def __call__(self, x: BevRows) -> Tensor:
        """(rows, 64) to contiguous (B, classes, H, W) logits."""
        return sum_taps(self._hidden.multiply(x, self._taps, 9 * self._classes), self._bias, x, self._classes)


def sum_taps(products: Tensor, bias: Tensor, x: BevRows, classes: int) -> Tensor:
    """Contiguous (B, classes, H, W) float16 of a 3 by 3 convolution: in each cell what those around it have for it.

    Args:
        products: (tiles, 9 classes, cells of a tile) float32, by taps.
        bias: (at least classes,) float32.
        x: A map of these tiles.
        classes: Channels out.
    """
    from dsvt_ros.kernels import heatmaps as kernels

    across, down, clouds = tiles_of(x)
    maps = x.rows.new_empty(clouds, classes, x.height, x.width)
    kernels.sum_taps[(across * down * clouds,)](
        products, bias, maps, x.height, x.width, CLASSES=classes, ROOM=power_of_two(classes)
    )
    return maps
