"""The BEV backbone and the convolutions of CenterHead on maps as rows of cells; see `kernels.convolution`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.extents import MIN_EXTENT, power_of_two
from dsvt_ros.fused.structures import Grid
from dsvt_ros.fused.weights import half
from dsvt_ros.model.bev_backbone import BevBackbone, ResidualBlock

ROWS = 128
MAX_COLUMNS = 128
MAX_CHUNK = 64
NARROW = 64
"""Channels out of convolutions that read their input once for three taps where `HopperConvolution` is not taken,"""
NARROW_FROM = 256
"""and the fewest channels in from which on that is faster (measured on an H200)."""
GATHER_CELLS = 8
"""That one warp computes (8 measured faster than 16 and 32 on an H200)."""
INDEX_BLOCK = 32
WARPGROUPS_FROM = 9
"""Compute capability of GPUs that keep sums of products in fewer registers."""
HOPPER = 9
"""Compute capability of GPUs that have kernels of their own."""
HOPPER_CHANNELS = 128
"""Of maps whose convolutions leave out what is far from all voxels, on such a GPU."""
HOPPER_HEAD_CHANNELS = 64
"""Of maps that convolutions of the head on such a GPU write."""
HOPPER_PRODUCTS = 64
"""Room for what a cell has for its neighbours, a number for each tap and class."""
LIST_BLOCK = 2048
MAX_ELEMENTS = 2**31 - 1
"""Of a map: kernels count in 32 bits."""


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
    """A convolution, all that follows it, and its launch."""

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
        grid = (-(-num_rows // ROWS), self.channels_out // blocks["COLUMNS"])
        weights = descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"])
        target = descriptor(output, ROWS, blocks["COLUMNS"])
        if self.stride > 1:
            kernels.convolve_strided[grid](
                x.rows, weights, self.bias, target, height, width, x.height, x.width, num_rows,
                CIN=self.channels_in, TAPS=self.taps, STRIDE=self.stride, ROWS=ROWS, RELU=relu, **blocks,
            )  # fmt: skip
            return BevRows(output, height, width)
        is_plain = relu and residual is None and products is None and output.is_contiguous()
        if is_plain and self.taps == 3 and self.channels_out == NARROW and self.channels_in >= NARROW_FROM:
            kernels.convolve_narrow[(-(-num_rows // (ROWS - 2)),)](
                descriptor(x.rows, ROWS, blocks["CHUNK"]), weights, self.bias, output, height, width, num_rows,
                CIN=self.channels_in, ROWS=ROWS, **(blocks | {"STAGES": 2}),
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


class FirstBlock:
    """The first residual block: its input is the voxels, and cells without one need no arithmetic.

    Every voxel is multiplied with the weights of all taps of the first convolution, and of the shortcut; then every
    cell sums what the voxels around it have for it.
    """

    def __init__(self, block: ResidualBlock) -> None:
        conv, shortcut = block.conv1, block.downsample_layer[0]  # type: ignore[index]
        assert isinstance(shortcut, nn.Conv2d)
        self.stride = conv.stride[0]
        first, beside = FusedConvolution(conv), FusedConvolution(shortcut)
        self.second = FusedConvolution(block.conv2)
        self.channels = first.channels_out
        if self.channels & (self.channels - 1):
            raise EngineError(f"fused convolutions take powers of two as first channels, not {conv.out_channels}")
        taps = torch.cat([first.matrix.view(9, -1, self.channels), beside.matrix[None]])
        self.matrix = taps.transpose(0, 1).flatten(1).contiguous()
        self.bias = first.bias
        # The shortcut is added where the second convolution adds its own bias.
        self.second.bias = self.second.bias + beside.bias

    def __call__(self, features: Tensor, grid: Grid) -> BevRows:
        """(V, D) features to (rows, channels)."""
        x, products = self.gather(features, grid)
        return self.second(x, products=products)

    def gather(self, features: Tensor, grid: Grid) -> tuple[BevRows, tuple[Tensor, Tensor]]:
        """The first convolution, and the shortcut as `products` for the second."""
        from dsvt_ros.kernels import convolution as kernels

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


class HopperStage:
    """A first stage of stride 1 whose convolutions leave out what is far from all voxels, on Hopper GPUs.

    Of an empty map, all cells far from its border have the same value after each convolution. So have those of other
    maps that are far from all voxels, too.
    """

    def __init__(self, blocks: list[Any]) -> None:
        """Take over weights of a `FirstBlock` and what follows it."""
        from dsvt_ros.kernels import hopper_convolution as kernels

        self._first: FirstBlock = blocks[0]
        self._convolutions = [self._first.second]
        for block in blocks[1:]:
            self._convolutions += [block.first, block.second]
        self._weights = [kernels.weight_rows(conv.matrix) for conv in self._convolutions]
        # The first convolution before these has brought voxels to their neighbours.
        self._reach = 1 + len(self._convolutions)
        device = self._first.matrix.device
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count
        self._constants = self._weights[0].new_zeros(len(self._convolutions), HOPPER_CHANNELS)
        self._constants = self._find_constants(device)

    @staticmethod
    def take(blocks: list[Any]) -> bool:
        """Whether the kernel takes these blocks on their device."""
        first, *others = blocks
        sizes = (first.stride, first.channels) == (1, HOPPER_CHANNELS)
        # Blocks without a shortcut keep channels and stride.
        return is_hopper(first.matrix.device) and sizes and all(block.shortcut is None for block in others)

    def __call__(self, features: Tensor, grid: Grid) -> BevRows:
        """(V, D) features to (rows, 128)."""
        x, products = self._first.gather(features, grid)
        check_size(x.rows)
        return self._convolve(x, products, self._list(x, products[1]))[-1]

    def _find_constants(self, device: torch.device) -> Tensor:
        """(convolutions, 128): values far from everything, by the kernel that computes others."""
        size = 2 * self._reach + 1
        grid = Grid(
            (size, size, 1),
            torch.full((size * size,), -1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        features = self._first.matrix.new_zeros(1, self._first.matrix.shape[0])
        x, products = self._first.gather(features, grid)
        maps = self._convolve(x, products, every_tile(tiles_of(x), len(self._weights), device))
        return torch.stack([each.image()[0, :, self._reach, self._reach] for each in maps])

    def _list(self, x: BevRows, voxel_at: Tensor) -> Tensor:
        return list_tiles(x, voxel_at, first_radius=2, reach=self._reach)

    def _convolve(self, x: BevRows, products: tuple[Tensor, Tensor], lists: Tensor) -> list[BevRows]:
        """The map after each convolution, given for each a list of tiles."""
        maps: list[BevRows] = []
        for number, tiles in enumerate(lists):
            # Each block ends with the sum of its input, or of the shortcut, and its second convolution.
            beside = maps[number - 2] if number >= 2 and number % 2 == 0 else None
            x = self._launch(number, x, tiles, beside, products if number == 0 else None)
            maps.append(x)
        return maps

    def _launch(
        self, number: int, x: BevRows, tiles: Tensor, beside: BevRows | None, products: tuple[Tensor, Tensor] | None
    ) -> BevRows:
        from dsvt_ros.kernels import hopper_convolution as kernels

        output = torch.empty_like(x.rows)
        features, voxel_at = products or (x.rows, tiles)
        kernels.convolve_tiles[(self._programs,)](
            kernels.map_descriptor(x.rows, x.width), kernels.weight_descriptor(self._weights[number]),
            self._convolutions[number].bias, kernels.map_descriptor((beside or x).rows, x.width), features, voxel_at,
            output, tiles, self._constants[number], x.height, x.width, math.prod(tiles_of(x)),
            PRODUCT_STRIDE=features.stride(0), RESIDUAL=2 if products else 1 if beside else 0,
            num_warps=kernels.NUM_WARPS, maxnreg=kernels.MAX_REGISTERS,
        )  # fmt: skip
        return BevRows(output, x.height, x.width)


class Upsampling:
    """A transposed convolution as wide as its stride, with ReLU."""

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        self.stride = conv.stride[0]
        self.channels_in, self.channels_out = room_for(conv.in_channels), room_for(conv.out_channels)
        weight = conv.weight.detach()
        matrix = weight.new_zeros(self.stride**2, self.channels_in, self.channels_out)
        matrix[:, : conv.in_channels, : conv.out_channels] = weight.permute(2, 3, 0, 1).flatten(0, 1)
        self.matrix = half(matrix.flatten(0, 1))
        self.bias = weight.new_zeros(self.channels_out)
        if conv.bias is not None:
            self.bias[: conv.out_channels] = conv.bias.detach()

    def __call__(self, x: BevRows, *, output: Tensor) -> BevRows:
        """Write the upsampled map to `output` (rows, channels out), which may be a part of wider rows."""
        from dsvt_ros.kernels import convolution as kernels

        blocks = blocks_of(self.channels_in, self.channels_out, self.matrix.device)
        num_rows = x.rows.shape[0]
        if self.stride == 1:
            like = descriptor(output, ROWS, blocks["COLUMNS"])
            kernels.convolve[-(-num_rows // ROWS), self.channels_out // blocks["COLUMNS"]](
                descriptor(x.rows, ROWS, blocks["CHUNK"]), descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"]),
                self.bias, like, output, output, like, x.height, x.width, num_rows, CIN=self.channels_in, TAPS=1,
                ROWS=ROWS, PRODUCT_STRIDE=0, RESIDUAL=0, RELU=True, CLASSES=0, **blocks,
            )  # fmt: skip
            return BevRows(output, x.height, x.width)
        lines = num_rows // (x.width + 1)
        kernels.upsample[self.stride * (self.channels_out // blocks["COLUMNS"]), -(-(x.width + 1) // ROWS), lines](
            descriptor(x.rows, ROWS, blocks["CHUNK"]), descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"]),
            self.bias, output, x.height, x.width,
            CIN=self.channels_in, STRIDE=self.stride, OUTPUT_STRIDE=output.stride(0), ROWS=ROWS, **blocks,
        )  # fmt: skip
        return BevRows(output, x.height * self.stride, x.width * self.stride)


class FusedBevBackbone:
    """`BevBackbone` from voxel features to rows of cells."""

    def __init__(self, backbone: BevBackbone) -> None:
        """Take over the weights of a backbone whose batch norms are folded.

        Raises:
            EngineError: The kernels do not take its sizes.
        """
        self._stages: list[list[Any]] = []
        self._resamplings: list[FusedConvolution | Upsampling] = []
        for number, (stage, deblock) in enumerate(zip(backbone.blocks, backbone.deblocks, strict=True)):
            assert isinstance(stage, nn.Sequential)
            assert isinstance(deblock, nn.Sequential)
            blocks: list[Any] = []
            for block in stage:
                assert isinstance(block, ResidualBlock)
                blocks.append(FirstBlock(block) if number == 0 and not blocks else _Block(block))
            if number == 0 and HopperStage.take(blocks):
                blocks = [HopperStage(blocks)]
            self._stages.append(blocks)
            resample = deblock[0]
            if isinstance(resample, nn.ConvTranspose2d):
                self._resamplings.append(Upsampling(resample))
            else:
                assert isinstance(resample, nn.Conv2d)
                self._resamplings.append(FusedConvolution(resample))
        widths = [resample.channels_out for resample in self._resamplings]
        self._slices = [slice(sum(widths[:i]), sum(widths[: i + 1])) for i in range(len(widths))]
        real = [deblock[0].out_channels for deblock in backbone.deblocks]  # type: ignore[index]
        device = self._resamplings[0].bias.device
        sources = [torch.arange(count) + part.start for count, part in zip(real, self._slices, strict=True)]
        self.sources = torch.cat(sources).to(device)
        """(channels,) int64: where the channels of the backbone lie in the rows."""
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda" and len(self._stages) > 1:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def image(self, rows: BevRows) -> Tensor:
        """(B, channels, H, W) view, or a copy where channels do not lie side by side."""
        image = rows.image()
        if image.shape[1] == len(self.sources):
            return image
        return image[:, self.sources]

    def __call__(self, features: Tensor, grid: Grid) -> BevRows:
        """(V, D) float16 features of the pillars in `grid` to (rows, channels)."""
        x: BevRows | None = None
        rows: Tensor | None = None
        results = []
        stages = []  # kept until they have been read
        for blocks, resample, part in zip(self._stages, self._resamplings, self._slices, strict=True):
            for block in blocks:
                x = block(features, grid) if x is None else block(x)
            assert x is not None
            height, width = _resampled(x, resample)
            if rows is None:
                clouds = x.rows.shape[0] // ((x.height + 1) * (x.width + 1))
                rows = features.new_empty(clouds * (height + 1) * (width + 1), self._slices[-1].stop)
            # The next stage leaves much of a large GPU idle.
            with beside(self._side, last=resample is self._resamplings[-1]):
                results.append(resample(x, output=rows[:, part]))
            stages.append(x)
        assert rows is not None
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        return BevRows(rows, results[-1].height, results[-1].width)


class FusedHeatmaps:
    """CenterHead's shared convolution and the heatmaps of all its groups."""

    def __init__(self, shared: nn.Conv2d, hidden: nn.Conv2d, output: nn.Conv2d, sources: Tensor, classes: int) -> None:
        """Take over weights; `sources` as for `FusedConvolution`, and the first `classes` channels are wanted."""
        self._shared: FusedConvolution | HopperConvolution = FusedConvolution(shared, sources)
        if HopperConvolution.take(self._shared):
            self._shared = HopperConvolution(self._shared)
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


class HopperConvolution:
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
        from dsvt_ros.kernels.convolution import TALL, WIDE

        products = self._bias.new_empty(math.prod(tiles_of(x)), count, TALL.value * WIDE.value)
        check_size(products.flatten(1))
        self._launch(x, x, taps, products, count)
        return products

    def _launch(self, x: BevRows, output: BevRows, taps: Tensor, products: Tensor, count: int) -> None:
        from dsvt_ros.kernels import hopper_head as kernels
        from dsvt_ros.kernels.hopper_convolution import MAX_REGISTERS, NUM_WARPS

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
        self._hidden, self._bias, self._classes = HopperConvolution(hidden), output.bias, classes
        self._taps = output.matrix.new_zeros(HOPPER_PRODUCTS, HOPPER_HEAD_CHANNELS)
        taps = output.matrix.view(9, HOPPER_HEAD_CHANNELS, -1)[..., :classes]
        self._taps[: 9 * classes] = taps.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def take(hidden: FusedConvolution, classes: int) -> bool:
        """Whether the kernels take a first convolution on its device, and so many classes."""
        narrow = hidden.channels_in == HOPPER_HEAD_CHANNELS
        return narrow and HopperConvolution.take(hidden) and 9 * classes <= HOPPER_PRODUCTS

    def __call__(self, x: BevRows) -> Tensor:
        """(rows, 64) to contiguous (B, classes, H, W) logits."""
        return sum_taps(self._hidden.multiply(x, self._taps, 9 * self._classes), self._bias, x, self._classes)


class _Block:
    def __init__(self, block: ResidualBlock) -> None:
        self.first, self.second = FusedConvolution(block.conv1), FusedConvolution(block.conv2)
        shortcut = block.downsample_layer
        self.shortcut = FusedConvolution(shortcut[0]) if isinstance(shortcut, nn.Sequential) else None  # type: ignore[arg-type]

    def __call__(self, x: BevRows) -> BevRows:
        beside = x if self.shortcut is None else self.shortcut(x, relu=False)
        return self.second(self.first(x), residual=beside)


@contextmanager
def beside(side: torch.cuda.Stream | None, *, last: bool) -> Iterator[None]:
    """Launch on another stream, from here on beside the current one; not what is `last` anyway."""
    if side is None or last:
        yield
        return
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


def multiply(features: Tensor, matrix: Tensor, num_rows: Tensor) -> Tensor:
    """(V, K) times (K, N), float16, of which the first `num_rows` (1,) int32 rows are written."""
    from dsvt_ros.kernels import convolution as kernels

    count, channels = features.shape
    blocks = blocks_of(channels, matrix.shape[1], matrix.device)
    output = features.new_empty(count, matrix.shape[1])
    # Faster than with three stages (measured on an H200).
    kernels.multiply[(matrix.shape[1] // blocks["COLUMNS"], -(-count // ROWS))](
        descriptor(features, ROWS, blocks["CHUNK"]), descriptor(matrix, blocks["CHUNK"], blocks["COLUMNS"]),
        descriptor(output, ROWS, blocks["COLUMNS"]), num_rows, CIN=channels, ROWS=ROWS, **(blocks | {"STAGES": 2}),
    )  # fmt: skip
    return output


def sum_taps(products: Tensor, bias: Tensor, x: BevRows, classes: int) -> Tensor:
    """Contiguous (B, classes, H, W) float16 of a 3 by 3 convolution: in each cell what those around it have for it.

    Args:
        products: (tiles, 9 classes, cells of a tile) float32, by taps.
        bias: (at least classes,) float32.
        x: A map of these tiles.
        classes: Channels out.
    """
    from dsvt_ros.kernels import convolution as kernels

    across, down, clouds = tiles_of(x)
    maps = x.rows.new_empty(clouds, classes, x.height, x.width)
    kernels.sum_taps[(across * down * clouds,)](
        products, bias, maps, x.height, x.width, CLASSES=classes, ROOM=power_of_two(classes)
    )
    return maps


def tiles_of(x: BevRows) -> tuple[int, int, int]:
    """Tiles of a map along x and y, with the cells around it; and maps."""
    from dsvt_ros.kernels.convolution import TALL, WIDE

    across, down = -(-(x.width + 1) // WIDE.value), -(-(x.height + 1) // TALL.value)
    return across, down, x.rows.shape[0] // ((x.height + 1) * (x.width + 1))


def list_tiles(x: BevRows, voxel_at: Tensor, *, first_radius: int, reach: int) -> Tensor:
    """For each radius from the first to `reach` the tiles of maps like `x` within it; see the kernel `list_tiles`.

    Args:
        x: A map.
        voxel_at: (rows,) int32, the voxel in each of its cells, -1 for none.
        first_radius: In cells, like all others.
        reach: The last radius.
    """
    from dsvt_ros.kernels import convolution as kernels

    grid = tiles_of(x)
    count, radii = math.prod(grid), reach + 1 - first_radius
    room = [power_of_two(extent.value + 2 * reach) for extent in (kernels.TALL, kernels.WIDE)]
    distance = voxel_at.new_empty(count)
    kernels.measure_tiles[grid](
        voxel_at, distance, x.height, x.width, REACH=reach, ROOM_TALL=room[0], ROOM_WIDE=room[1], num_warps=1
    )
    # Each list begins at a multiple of 16 bytes.
    listed = voxel_at.new_empty(radii, 4 + -(-count // 4) * 4)
    kernels.list_tiles[(radii,)](
        distance, listed, listed.stride(0), NUM_TILES=count, FIRST_RADIUS=first_radius, BLOCK=LIST_BLOCK, num_warps=8
    )
    return listed


def every_tile(grid: tuple[int, int, int], lists: int, device: torch.device) -> Tensor:
    """So many lists, as from `list_tiles`, of all tiles."""
    count = math.prod(grid)
    listed = torch.zeros(lists, 4 + -(-count // 4) * 4, dtype=torch.int32, device=device)
    listed[:, 0] = count
    listed[:, 4 : 4 + count] = torch.arange(count, device=device)
    return listed


def is_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


def num_warps(device: torch.device) -> int:
    """Warps for blocks of ROWS by MAX_COLUMNS sums."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < WARPGROUPS_FROM
    return 8 if older else 4


def blocks_of(channels_in: int, channels_out: int, device: torch.device) -> dict[str, int]:
    """Extents of blocks and how a kernel is launched."""
    chunk = min(channels_in & -channels_in, MAX_CHUNK)
    columns = min(channels_out & -channels_out, MAX_COLUMNS)
    stages = 3 if columns == MAX_COLUMNS else 4
    return {"CHUNK": chunk, "COLUMNS": columns, "STAGES": stages, "num_warps": num_warps(device)}


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """A matrix that kernels read and write in blocks of rows by columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    check_size(matrix)
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def check_size(matrix: Tensor) -> None:
    """`EngineError` if a matrix of a row a cell has more elements than the kernels can number."""
    if matrix.shape[0] * matrix.stride(0) > MAX_ELEMENTS:
        raise EngineError(
            f"a map of {matrix.shape[0]} cells is more than the kernels can number; use torch or tensorrt"
        )


def _resampled(x: BevRows, resample: FusedConvolution | Upsampling) -> tuple[int, int]:
    if isinstance(resample, Upsampling):
        return x.height * resample.stride, x.width * resample.stride
    return x.height // resample.stride, x.width // resample.stride
