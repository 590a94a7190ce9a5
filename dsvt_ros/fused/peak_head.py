"""CenterHead where only its heatmaps are computed everywhere, and all else at their peaks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import CENTER_BRANCHES
from dsvt_ros.fused.extents import MIN_EXTENT, power_of_two
from dsvt_ros.model.center_head import CenterHead, SeparateHead

ROWS = 128
"""Cells around peaks that a program works on."""
STAGES = 3
"""Of them on their way to shared memory."""
NUM_WARPS = 8
ALIGNMENT = 8
"""Channels of the heatmap come in multiples of so many: convolutions with fewer miss the tensor cores."""


class PeakHead(nn.Module):
    """What `CenterHead` computes, for inference.

    Attributes:
        columns: First column of each branch in what `at_peaks` gives.
    """

    hidden_weights: Tensor
    hidden_bias: Tensor
    output_weights: Tensor
    output_bias: Tensor
    first_column: Tensor

    def __init__(self, head: CenterHead) -> None:
        """Take over the weights of `head`, whose batch norms are folded already."""
        super().__init__()
        groups = [group for group in head.heads_list if isinstance(group, SeparateHead)]
        self.shared_conv = head.shared_conv
        with torch.no_grad():
            self._merge_heatmaps(groups)
            self._stack_branches(groups)

    def forward(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) BEV features to (B, classes, H, W) heatmap logits and the (B, D, H, W) map for `at_peaks`."""
        shared = self.shared_conv(bev)
        heatmap: Tensor = self.heatmap(F.relu(self.heatmap_hidden(shared), inplace=True))
        return heatmap[:, : self._num_classes], shared

    def at_peaks(self, shared: Tensor, index: Tensor) -> Tensor:
        """Evaluate the other branches.

        Args:
            shared: (B, D, H, W), the channels of a cell side by side in memory, in the type of the weights.
            index: (B, G, K) int32 ``(class * H + row) * W + column`` of each group's peaks, contiguous; -1 in rows
                without a peak, which follow all others.

        Returns:
            (B, G, K, columns) float32, see `columns`; anything in rows without a peak.
        """
        from dsvt_ros.kernels import peak_head as kernels

        clouds, width, rows, columns = shared.shape
        assert shared.stride(1) == 1
        groups, count = index.shape[1:]
        values = shared.new_empty(clouds, groups, count, self._num_columns, dtype=torch.float32)
        peaks = ROWS // kernels.AREA.value
        kernels.branches_at_peaks[-(-count // peaks), len(self.columns), clouds * groups](
            shared, index,
            self.hidden_weights, self.hidden_bias, self.output_weights, self.output_bias, self.first_column,
            values, groups, rows, columns, shared.stride(0), shared.stride(2), shared.stride(3),
            K=count,
            WIDTH=width,
            PADDED=self._padded_width,
            ROWS=ROWS,
            STAGES=STAGES,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        return values

    def _merge_heatmaps(self, groups: list[SeparateHead]) -> None:
        """All groups' heatmap branches as two convolutions, the second one block-diagonal."""
        first = [_convolutions(group, "hm")[0] for group in groups]
        second = [_convolutions(group, "hm")[1] for group in groups]
        width = first[0].in_channels
        self._num_classes = sum(conv.out_channels for conv in second)
        padded = -(-self._num_classes // ALIGNMENT) * ALIGNMENT
        self.heatmap_hidden = nn.Conv2d(width, width * len(first), 3, padding=1)
        self.heatmap = nn.Conv2d(width * len(first), padded, 3, padding=1)
        self.heatmap_hidden.weight.copy_(torch.cat([conv.weight for conv in first]))
        _bias(self.heatmap_hidden).copy_(torch.cat([_bias(conv) for conv in first]))
        self.heatmap.weight.zero_()
        _bias(self.heatmap).zero_()
        row = 0
        for group, conv in enumerate(second):
            rows = slice(row, row + conv.out_channels)
            self.heatmap.weight[rows, group * width : (group + 1) * width] = conv.weight
            _bias(self.heatmap)[rows] = _bias(conv)
            row += conv.out_channels
        device = first[0].weight.device
        self.heatmap_hidden.to(device)
        self.heatmap.to(device)

    def _stack_branches(self, groups: list[SeparateHead]) -> None:
        """Weights of the other branches as `kernels.peak_head` wants them."""
        names = [name for name in groups[0].channels if name != "hm"]
        channels = [CENTER_BRANCHES[name] for name in names]
        first = [sum(channels[:number]) for number in range(len(names) + 1)]
        self.columns = dict(zip(names, first, strict=False))
        self._num_columns = first[-1]
        like = _convolutions(groups[0], names[0])[0].weight
        width = like.shape[1]
        padded = max(MIN_EXTENT, power_of_two(width))
        outputs = max(CENTER_BRANCHES.values())
        hidden_weights = like.new_zeros(len(groups), len(names), 9, padded, padded)
        hidden_bias = like.new_zeros(len(groups), len(names), padded)
        output_weights = like.new_zeros(len(groups), len(names), outputs, 9, padded)
        output_bias = like.new_zeros(len(groups), len(names), outputs)
        for number, group in enumerate(groups):
            for branch, name in enumerate(names):
                hidden, output = _convolutions(group, name)
                at, count = (number, branch), output.out_channels
                hidden_weights[at][:, :width, :width] = hidden.weight.flatten(2).permute(2, 1, 0)
                hidden_bias[at][:width] = _bias(hidden)
                output_weights[at][:count, :, :width] = output.weight.flatten(2).transpose(1, 2)
                output_bias[at][:count] = _bias(output)
        self._padded_width = padded
        # Flat, for a module may be told to keep everything of four axes with its channels last.
        self.register_buffer("hidden_weights", hidden_weights.flatten())
        self.register_buffer("hidden_bias", hidden_bias.flatten())
        self.register_buffer("output_weights", output_weights.flatten())
        self.register_buffer("output_bias", output_bias.flatten())
        self.register_buffer("first_column", torch.tensor(first, dtype=torch.int32, device=like.device))


def _convolutions(group: SeparateHead, branch: str) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Both convolutions of a branch."""
    hidden, output = group.get_submodule(f"{branch}.0.0"), group.get_submodule(f"{branch}.1")
    assert isinstance(hidden, nn.Conv2d)
    assert isinstance(output, nn.Conv2d)
    return hidden, output


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # folding a batch norm gives one
    return conv.bias
