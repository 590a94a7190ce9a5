"""Transposed convolutions on maps as rows of cells."""

from __future__ import annotations

from torch import Tensor, nn

from dsvt_ros.fused.convolution import BevRows, room_for
from dsvt_ros.fused.launch import ROWS, blocks_of, descriptor
from dsvt_ros.fused.weights import half


class Upsampling:
    """A transposed convolution as wide as its stride, with ReLU.

    Attributes:
        stride: The same along both axes.
        channels_in: As in `FusedConvolution`.
        channels_out: Likewise.
        matrix: (stride * stride * channels in, channels out) float16 weights, places in a cell by y, then x.
        bias: (channels out,) float32.
    """

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        """Take over weights; the batch norm is folded.

        Raises:
            EngineError: They are beyond float16.
        """
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
        from dsvt_ros.kernels.convolution import convolve
        from dsvt_ros.kernels.upsampling import upsample

        blocks = blocks_of(self.channels_in, self.channels_out, self.matrix.device)
        num_rows = x.rows.shape[0]
        if self.stride == 1:
            like = descriptor(output, ROWS, blocks["COLUMNS"])
            convolve[-(-num_rows // ROWS), self.channels_out // blocks["COLUMNS"]](
                descriptor(x.rows, ROWS, blocks["CHUNK"]), descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"]),
                self.bias, like, output, output, like, x.height, x.width, num_rows, CIN=self.channels_in, TAPS=1,
                ROWS=ROWS, PRODUCT_STRIDE=0, RESIDUAL=0, RELU=True, CLASSES=0, **blocks,
            )  # fmt: skip
            return BevRows(output, x.height, x.width)
        lines = num_rows // (x.width + 1)
        upsample[self.stride * (self.channels_out // blocks["COLUMNS"]), -(-(x.width + 1) // ROWS), lines](
            descriptor(x.rows, ROWS, blocks["CHUNK"]), descriptor(self.matrix, blocks["CHUNK"], blocks["COLUMNS"]),
            self.bias, output, x.height, x.width,
            CIN=self.channels_in, STRIDE=self.stride, OUTPUT_STRIDE=output.stride(0), ROWS=ROWS, **blocks,
        )  # fmt: skip
        return BevRows(output, x.height * self.stride, x.width * self.stride)
