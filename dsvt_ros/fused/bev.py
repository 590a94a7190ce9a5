"""The BEV backbone on maps as rows of cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.fused.first_block import FirstBlock
from dsvt_ros.fused.hopper_stage import HopperStage
from dsvt_ros.fused.residual_block import FusedBlock
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
        (first, *others), *stages = (_blocks(stage) for stage in backbone.blocks)
        self._first: FirstBlock | HopperStage = FirstBlock(first)
        # Of the first stage, what follows its first block, unless both are one.
        self._stages = [[FusedBlock(block) for block in stage] for stage in (others, *stages)]
        if HopperStage.take(self._first, self._stages[0]):
            self._first, self._stages[0] = HopperStage(self._first, self._stages[0]), []
        self._resamplings: list[FusedConvolution | Upsampling] = []
        for deblock in backbone.deblocks:
            assert isinstance(deblock, nn.Sequential)
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
        x = self._first(features, grid)
        rows: Tensor | None = None
        results = []
        stages = []  # kept until they have been read
        for blocks, resample, part in zip(self._stages, self._resamplings, self._slices, strict=True):
            for block in blocks:
                x = block(x)
            height, width = _resampled(x, resample)
            if rows is None:
                clouds = x.rows.shape[0] // ((x.height + 1) * (x.width + 1))
                rows = features.new_empty(clouds * (height + 1) * (width + 1), self._slices[-1].stop)
            # The next stage leaves much of a large GPU idle.
            with side_stream(self._side, last=resample is self._resamplings[-1]):
                results.append(resample(x, output=rows[:, part]))
            stages.append(x)
        assert rows is not None
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        return BevRows(rows, results[-1].height, results[-1].width)


@contextmanager
def side_stream(side: torch.cuda.Stream | None, *, last: bool) -> Iterator[None]:
    """Launch on another stream, from here on beside the current one; not what is `last` anyway."""
    if side is None or last:
        yield
        return
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield


def _blocks(stage: nn.Module) -> list[ResidualBlock]:
    blocks = []
    for block in stage.children():
        assert isinstance(block, ResidualBlock)
        blocks.append(block)
    return blocks


def _resampled(x: BevRows, resample: FusedConvolution | Upsampling) -> tuple[int, int]:
    if isinstance(resample, Upsampling):
        return x.height * resample.stride, x.width * resample.stride
    return x.height // resample.stride, x.width // resample.stride
