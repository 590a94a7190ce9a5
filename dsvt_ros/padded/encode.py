"""The pillar encoder on points that lie voxel after voxel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvt_ros.config import ModelConfig
from dsvt_ros.constants import constant
from dsvt_ros.fused.weights import half
from dsvt_ros.model.pillar_encoder import PillarEncoder, PointNetLayer
from dsvt_ros.padded.structures import SortedVoxels


class PaddedEncoder:
    """What `PillarEncoder` does, in float16 after the first layer's ReLU.

    A later layer takes of each point its features p and the voxel's maximum m of them. As relu(p P + m M + b) grows
    with p P, the last layer's maximum is relu(max(p P) + m M + b): nothing of a voxel has to be copied to its points.
    """

    def __init__(self, encoder: PillarEncoder, model: ModelConfig) -> None:
        """Take over weights.

        Args:
            encoder: Its batch norms are folded (`model.fold.fold_batch_norms`).
            model: That of the encoder.

        Raises:
            EngineError: Weights beyond the range of float16.
        """
        self._model = model
        first, *others = [layer.linear for layer in encoder.pfn_layers if isinstance(layer, PointNetLayer)]
        self._first_weight, self._first_bias = first.weight.detach().T.contiguous(), first.bias.detach().clone()
        self._layers: list[tuple[Tensor, Tensor, Tensor]] = []
        for linear in others:
            of_point, of_voxel = linear.weight.chunk(2, dim=1)
            self._layers.append((half(of_point.T), half(of_voxel.T), half(linear.bias)))

    def __call__(self, voxels: SortedVoxels) -> Tensor:
        """(V, D) float16 features; zeros in rows beyond the number of voxels. Never waits for the device."""
        inputs = self._point_features(voxels)
        features = torch._addmm_activation(self._first_bias, inputs, self._first_weight).half()
        for number, (of_point, of_voxel, bias) in enumerate(self._layers):
            # Of no voxel at all the maximum is 0: no feature is less.
            added = torch.addmm(bias, _maximum(features, voxels, 0.0), of_voxel)
            features = features @ of_point
            if number == len(self._layers) - 1:
                return F.relu_(_maximum(features, voxels, -math.inf) + added)
            at_point = voxels.voxel_of_point.clamp_max(len(added) - 1)
            features = F.relu_(features + added.index_select(0, at_point))
        return _maximum(features, voxels, 0.0)

    def _point_features(self, voxels: SortedVoxels) -> Tensor:
        """(N, C + 6), see `PillarEncoder.point_features`."""
        nx, ny, nz = voxels.grid.size
        cell = voxels.grid.cell_of_voxel
        low = constant(self._model.point_cloud_range[:3], voxels.points)
        size = constant(self._model.voxel_size, voxels.points)
        xyz = torch.stack([cell // (ny * nz) % nx, cell // nz % ny, cell % nz], 1)
        corner = F.pad(xyz * size + low, (0, 0, 0, 1))
        # From the corner, so that coordinates far from the origin cost no precision.
        offset = voxels.points[:, :3] - corner.index_select(0, voxels.voxel_of_point)
        mean = torch.segment_reduce(offset, "mean", offsets=voxels.start, axis=0, unsafe=True, initial=0.0)
        mean = F.pad(mean, (0, 0, 0, 1)).index_select(0, voxels.voxel_of_point)
        return torch.cat([voxels.points, offset - mean, offset - size / 2], 1)


def _maximum(features: Tensor, voxels: SortedVoxels, least: float) -> Tensor:
    """(N, D) features of points to (V, D) maxima of voxels, each `least` at least."""
    return torch.segment_reduce(features, "max", offsets=voxels.start, axis=0, unsafe=True, initial=least)
