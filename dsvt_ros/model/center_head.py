"""CenterHead: a heatmap a class and regression maps at every cell (CenterPoint; OpenPCDet ``CenterHead``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import HeadConfig
from dsvt_ros.model.bev_backbone import BN_EPS, BN_MOMENTUM


@dataclass(frozen=True)
class HeadMaps:
    """Raw outputs of the head, each (B, n, H, W).

    Attributes:
        heatmap: Logits, a channel a class.
        center: Offset of the box centre from the cell's corner in cells, x and y.
        center_z: Height of the box centre, m.
        dim: Logarithm of length, width, height.
        rot: Cosine and sine of the yaw.
        iou: Predicted 3D IoU of the box, scaled to [-1, 1]; None where the head has no such branch.
    """

    heatmap: Tensor
    center: Tensor
    center_z: Tensor
    dim: Tensor
    rot: Tensor
    iou: Tensor | None


class SeparateHead(nn.Module):
    """The branches, under their published names."""

    CHANNELS: ClassVar[dict[str, int]] = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1}

    def __init__(self, config: HeadConfig, num_classes: int) -> None:
        super().__init__()
        width = config.shared_channels
        self.channels = {name: self.CHANNELS.get(name, num_classes) for name in config.branches}
        for name, channels in self.channels.items():
            branch = nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width, eps=BN_EPS, momentum=BN_MOMENTUM),
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
    """A shared convolution and one group of branches for all classes."""

    def __init__(self, config: HeadConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.shared_conv = nn.Sequential(
            nn.Conv2d(in_channels, config.shared_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(config.shared_channels, eps=BN_EPS, momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
        )
        self.heads_list = nn.ModuleList([SeparateHead(config, num_classes)])

    def forward(self, bev: Tensor) -> HeadMaps:
        """(B, C, H, W) BEV features to maps."""
        return maps_from_branches(self.heads_list[0](self.shared_conv(bev)))


def maps_from_branches(branches: dict[str, Tensor]) -> HeadMaps:
    """Name the branches' outputs."""
    return HeadMaps(
        heatmap=branches["hm"],
        center=branches["center"],
        center_z=branches["center_z"],
        dim=branches["dim"],
        rot=branches["rot"],
        iou=branches.get("iou"),
    )


class MergedHead(nn.Module):
    """The same maps for inference: all branches' convolutions as two, batch norms folded in.

    The second convolution is block-diagonal. Its zeros cost nothing that six convolutions of one to three output
    channels would not waste on padding.
    """

    def __init__(self, head: CenterHead) -> None:
        super().__init__()
        self.shared_conv = head.shared_conv
        branches = head.heads_list[0]
        assert isinstance(branches, SeparateHead)
        self.channels = branches.channels
        first, second = [], []
        for name in self.channels:
            branch = branches.get_submodule(name)
            first.append(branch[0][0])  # type: ignore[index]
            second.append(branch[1])  # type: ignore[index]
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

    def forward(self, bev: Tensor) -> HeadMaps:
        """(B, C, H, W) BEV features to maps."""
        out = self.output(F.relu(self.hidden(self.shared_conv(bev)), inplace=True))
        parts = torch.split(out, list(self.channels.values()), dim=1)
        return maps_from_branches(dict(zip(self.channels, parts, strict=True)))
