"""The 2D backbone: residual stages over the BEV map, each upsampled to one resolution (``BaseBEVResBackbone``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import Backbone2dConfig

BN_EPS = 1e-3
BN_MOMENTUM = 0.01


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the shortcut is a 1x1 convolution where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, downsample: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.downsample_layer: nn.Module = nn.Identity()
        if downsample:
            self.downsample_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, channels, H / stride, W / stride)."""
        # In place: at full resolution every map that need not be written anew counts.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).add_(self.downsample_layer(x))
        return F.relu(out, inplace=True)


class BevBackbone(nn.Module):
    """Stages of residual blocks, and a convolution that brings each to the output's resolution."""

    def __init__(self, config: Backbone2dConfig, in_channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.deblocks = nn.ModuleList()
        for num_blocks, stride, channels, up_stride, up_channels in zip(
            config.blocks,
            config.strides,
            config.channels,
            config.upsample_strides,
            config.upsample_channels,
            strict=True,
        ):
            stage = [ResidualBlock(in_channels, channels, stride, downsample=True)]
            stage += [ResidualBlock(channels, channels, 1, downsample=False) for _ in range(num_blocks - 1)]
            self.blocks.append(nn.Sequential(*stage))
            self.deblocks.append(
                nn.Sequential(
                    _resample(channels, up_channels, up_stride),
                    nn.BatchNorm2d(up_channels, eps=BN_EPS, momentum=BN_MOMENTUM),
                    nn.ReLU(inplace=True),
                )
            )
            in_channels = channels

    def forward(self, bev: Tensor) -> Tensor:
        """(B, D, H, W) to (B, sum of upsample_channels, H / s, W / s) with s the output stride."""
        outputs = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            bev = block(bev)
            outputs.append(deblock(bev))
        return torch.cat(outputs, dim=1)


def _resample(in_channels: int, channels: int, stride: float) -> nn.Module:
    """Upsample by `stride`, or downsample where it is below 1.

    By 1 it is a transposed convolution too, as published: its weight lies the other way round than a convolution's.
    """
    if stride >= 1:
        return nn.ConvTranspose2d(in_channels, channels, round(stride), round(stride), bias=False)
    return nn.Conv2d(in_channels, channels, round(1 / stride), round(1 / stride), bias=False)
