"""CenterHead: a heatmap a class and regression maps at every cell (CenterPoint; OpenPCDet ``CenterHead``)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import CENTER_BRANCHES, CenterHeadConfig
from dsvt_ros.model.bev_backbone import BN_MOMENTUM
from dsvt_ros.structures import CenterMaps


class SeparateHead(nn.Module):
    """The branches of one group of classes, under their published names."""

    def __init__(self, config: CenterHeadConfig, num_classes: int) -> None:
        super().__init__()
        width = config.shared_channels
        self.channels = {name: CENTER_BRANCHES.get(name, num_classes) for name in config.branches}
        for name, channels in self.channels.items():
            branch = nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, bias=config.bias_before_norm),
                    nn.BatchNorm2d(width, eps=config.norm_eps, momentum=BN_MOMENTUM),
                    nn.ReLU(inplace=True),
                ),
                nn.Conv2d(width, channels, 3, padding=1),
            )
            self.add_module(name, branch)
        # A prior of 1 % keeps the focal loss of the many empty cells small at the start (RetinaNet section 4.1).
        heatmap = self.get_submodule("hm")[1]  # type: ignore[index]
        nn.init.constant_(heatmap.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, width, H, W) to one map a branch."""
        return {name: self.get_submodule(name)(x) for name in self.channels}


class CenterHead(nn.Module):
    """A shared convolution and a set of branches for each group of classes."""

    def __init__(self, config: CenterHeadConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = config.shared_channels
        self.shared_conv = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=config.bias_before_norm),
            nn.BatchNorm2d(width, eps=config.norm_eps, momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
        )
        sizes = [len(group) for group in config.groups] or [num_classes]
        self.heads_list = nn.ModuleList(SeparateHead(config, size) for size in sizes)

    def forward(self, bev: Tensor) -> CenterMaps:
        """(B, C, H, W) BEV features to maps."""
        shared = self.shared_conv(bev)
        groups = [head(shared) for head in self.heads_list]
        return maps_from_branches({name: torch.cat([maps[name] for maps in groups], 1) for name in groups[0]})


def maps_from_branches(branches: dict[str, Tensor]) -> CenterMaps:
    """Name the branches' outputs."""
    return CenterMaps(
        heatmap=branches["hm"],
        center=branches["center"],
        center_z=branches["center_z"],
        dim=branches["dim"],
        rot=branches["rot"],
        vel=branches.get("vel"),
        iou=branches.get("iou"),
    )


class MergedHead(nn.Module):
    """The same maps for inference: all branches' convolutions as two, batch norms folded in.

    The second convolution is block-diagonal. Its zeros cost nothing that six convolutions of one to three output
    channels would not waste on padding.
    """

    def __init__(self, head: CenterHead) -> None:
        """Merge; the batch norms of `head` are folded already."""
        super().__init__()
        self.shared_conv = head.shared_conv
        groups = [group for group in head.heads_list if isinstance(group, SeparateHead)]
        self.channels = {name: sum(group.channels[name] for group in groups) for name in groups[0].channels}
        branches = [group.get_submodule(name) for name in self.channels for group in groups]
        first = [branch[0][0] for branch in branches]  # type: ignore[index]
        second = [branch[1] for branch in branches]  # type: ignore[index]
        width = first[0].in_channels
        total = sum(self.channels.values())
        self.hidden = nn.Conv2d(width, width * len(first), 3, padding=1)
        self.output = nn.Conv2d(width * len(first), total, 3, padding=1)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat([conv.weight for conv in first]))
            self.hidden.bias.copy_(torch.cat([conv.bias for conv in first]))  # type: ignore[union-attr]
            self.output.weight.zero_()
            self.output.bias.copy_(torch.cat([conv.bias for conv in second]))  # type: ignore[union-attr]
            row = 0
            for i, conv in enumerate(second):
                rows = slice(row, row + conv.out_channels)
                self.output.weight[rows, i * width : (i + 1) * width] = conv.weight
                row += conv.out_channels

    def forward(self, bev: Tensor) -> CenterMaps:
        """(B, C, H, W) BEV features to maps."""
        out = self.output(F.relu(self.hidden(self.shared_conv(bev)), inplace=True))
        parts = torch.split(out, list(self.channels.values()), dim=1)
        return maps_from_branches(dict(zip(self.channels, parts, strict=True)))
