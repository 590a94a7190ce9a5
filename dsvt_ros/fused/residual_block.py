"""A residual block on maps as rows of cells."""

from __future__ import annotations

from torch import nn

from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.model.bev_backbone import ResidualBlock


class FusedBlock:
    """Any `ResidualBlock` of the BEV backbone but the first one, which has `FirstBlock`.

    Attributes:
        first: The first of its convolutions.
        second: The other, which the block's input is added to.
        shortcut: What brings that input to the size of the output; None where it has this size.
    """

    def __init__(self, block: ResidualBlock) -> None:
        """Take over the weights of a block whose batch norms are folded.

        Raises:
            EngineError: The kernels do not take its sizes, or it has weights beyond float16.
        """
        self.first, self.second = FusedConvolution(block.conv1), FusedConvolution(block.conv2)
        shortcut = block.downsample_layer
        self.shortcut = FusedConvolution(shortcut[0]) if isinstance(shortcut, nn.Sequential) else None  # type: ignore[arg-type]

    def __call__(self, x: BevRows) -> BevRows:
        """(rows, channels in) to (rows, channels out)."""
        residual = x if self.shortcut is None else self.shortcut(x, relu=False)
        return self.second(self.first(x), residual=residual)
