"""The BEV backbone on maps as rows of cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.fused.first_block import FirstBlock
from dsvt_ros.fused.hopper_stage import HopperStage
from dsvt_ros.fused.structures import Grid
from dsvt_ros.fused.upsampling import Upsampling
from dsvt_ros.model.bev_backbone import BevBackbone, ResidualBlock


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


def _resampled(x: BevRows, resample: FusedConvolution | Upsampling) -> tuple[int, int]:
    if isinstance(resample, Upsampling):
        return x.height * resample.stride, x.width * resample.stride
    return x.height // resample.stride, x.width // resample.stride
