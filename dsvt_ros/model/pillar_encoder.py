"""Pillar or voxel feature encoder: point features to one feature a voxel."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import ModelConfig
from dsvt_ros.structures import Voxels


class PointNetLayer(nn.Module):
    """Linear, batch norm, ReLU and the maximum over each voxel's points (PointPillars section 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, *, last: bool) -> None:
        super().__init__()
        # Inner layers hand on [point, voxel maximum], so each half takes half of the channels.
        self.last = last
        width = out_channels if last else out_channels // 2
        self.linear = nn.Linear(in_channels, width, bias=False)
        self.norm = nn.BatchNorm1d(width, eps=1e-3, momentum=0.01)

    def forward(self, features: Tensor, voxels: Voxels) -> Tensor:
        """(N, in) point features to (N, out) for an inner layer, or (V, out) for the last one."""
        features = F.relu(self.norm(self.linear(features)), inplace=True)
        index = voxels.voxel_of_point
        maximum = features.new_zeros(len(voxels), features.shape[1])
        # After the ReLU zero is the smallest value, and every voxel has a point.
        maximum = maximum.scatter_reduce(0, index[:, None].expand_as(features), features, "amax")
        return maximum if self.last else torch.cat([features, maximum[index]], dim=1)


class PillarEncoder(nn.Module):
    """The published dynamic pillar encoder (DSVT ``DynPillarVFE3D``; OpenPCDet ``DynamicVoxelVFE``)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        widths = [len(model.features) + 6, *model.encoder.channels]
        self.pfn_layers = nn.ModuleList(
            PointNetLayer(fan_in, fan_out, last=i == len(widths) - 2)
            for i, (fan_in, fan_out) in enumerate(pairwise(widths))
        )
        size = torch.tensor(model.voxel_size)
        self.register_buffer("voxel_size", size, persistent=False)
        self.register_buffer("first_center", torch.tensor(model.point_cloud_range[:3]) + size / 2, persistent=False)

    def forward(self, voxels: Voxels) -> Tensor:
        """Encode the points as offsets from their voxel's mean and centre.

        Returns:
            (V, D) features.
        """
        features = self.point_features(voxels)
        for layer in self.pfn_layers:
            features = layer(features, voxels)
        return features

    def point_features(self, voxels: Voxels) -> Tensor:
        """(N, C + 6): the point's columns, its offset from the voxel's mean and from the voxel's centre."""
        xyz, index = voxels.points[:, :3], voxels.voxel_of_point
        # Not bincount, for which the host waits on a GPU.
        count = xyz.new_zeros(len(voxels)).scatter_add_(0, index, xyz.new_ones(1).expand(len(xyz)))
        mean = xyz.new_zeros(len(voxels), 3).index_add(0, index, xyz) / count[:, None]
        assert isinstance(self.voxel_size, Tensor)
        assert isinstance(self.first_center, Tensor)
        center = voxels.coords[:, [3, 2, 1]] * self.voxel_size + self.first_center
        return torch.cat([voxels.points, xyz - mean[index], xyz - center[index]], dim=1)
