"""CenterHead's branches at the peaks of its heatmaps, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvt_ros.config import CENTER_BRANCHES
from dsvt_ros.fused.peak_head import PeakHead


class PaddedPeakHead(PeakHead):
    """A `PeakHead` whose branches are matrix products over the 5 by 5 cells around each peak."""

    def at_peaks(self, shared: Tensor, index: Tensor) -> Tensor:
        """See `PeakHead.at_peaks`."""
        clouds, width, rows, columns = shared.shape
        groups, names, padded = index.shape[1], list(self.columns), self._padded_width
        cell = index.long() % (rows * columns)
        near = torch.arange(-2, 3, device=shared.device)
        row = (cell // columns)[..., None, None] + near[:, None]
        column = (cell % columns)[..., None, None] + near
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        first = torch.arange(clouds, device=shared.device)[:, None, None, None, None] * (rows * columns)
        at = first + row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
        cells = shared.permute(0, 2, 3, 1).reshape(-1, width)
        around = cells.index_select(0, at.flatten()).view(*at.shape, width) * inside[..., None]

        # The hidden layer in the 3 by 3 cells that the output is made of; outside the map it is zero.
        patches = around.unfold(3, 3, 1).unfold(4, 3, 1)  # B, G, K, 3, 3, width, 3, 3
        patches = patches.permute(1, 0, 2, 3, 4, 6, 7, 5).reshape(groups, -1, 9 * width)
        weights = self.hidden_weights.view(groups, len(names), 9, padded, padded)[..., :width, :]
        weights = weights.permute(0, 2, 3, 1, 4).reshape(groups, 9 * width, -1)
        hidden = F.relu_(torch.baddbmm(self.hidden_bias.view(groups, 1, -1), patches, weights))
        hidden = hidden.view(groups, -1, 9, len(names), padded)
        hidden = hidden * inside[..., 1:4, 1:4].transpose(0, 1).reshape(groups, -1, 9, 1, 1)
        hidden = hidden.permute(0, 3, 1, 2, 4).reshape(groups * len(names), -1, 9 * padded)

        outputs = max(CENTER_BRANCHES.values())
        weights = self.output_weights.view(groups * len(names), outputs, -1).transpose(1, 2)
        values = torch.baddbmm(self.output_bias.view(-1, 1, outputs), hidden, weights).float()
        values = values.view(groups, len(names), clouds, -1, outputs)
        parts = [values[:, number, ..., : CENTER_BRANCHES[name]] for number, name in enumerate(names)]
        return torch.cat(parts, -1).transpose(0, 1)
