"""The pillar encoder in two kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.structures import OFFSET_SCALE, SEGMENT_POINTS, FusedVoxels
from dsvt_ros.model.pillar_encoder import PillarEncoder, PointNetLayer

MIN_EXTENT = 16
"""Of a block: what tensor cores take."""
HIDDEN = 32
"""Channels of the first layer in a block; the layer is padded to a multiple of it."""
MAX_CHUNK = 64
MAX_PARTS = 4
ROWS = 64
"""Segments, or voxels, of a program."""


class FusedEncoder:
    """What `PillarEncoder` does, in float16 but for the first layer.

    Calls must follow each other on one stream, which must belong to the tensors' device: what voxels of several
    segments have gathered is reset by the call's own kernels.
    """

    def __init__(self, encoder: PillarEncoder, model: ModelConfig, voxels: int) -> None:
        """Bring the weights into the order in which the kernels read them.

        Args:
            encoder: Its batch norms are folded (`model.fold.fold_batch_norms`).
            model: That of the encoder.
            voxels: Room for voxels, as in what it will be called with.

        Raises:
            EngineError: The encoder has sizes that the kernels do not take, or weights beyond float16.
        """
        channels = model.encoder.channels
        chunk = min(channels[-1] & -channels[-1], MAX_CHUNK)
        if len(channels) != 2 or chunk < MIN_EXTENT or channels[-1] // chunk > MAX_PARTS:
            raise EngineError(
                f"backend triton takes pillar encoders of two layers, the second with 1 to {MAX_PARTS} times 16, 32 "
                f"or 64 channels; this model has {', '.join(map(str, channels))}: use torch or tensorrt"
            )
        first, second = encoder.pfn_layers
        assert isinstance(first, PointNetLayer)
        assert isinstance(second, PointNetLayer)
        width = first.linear.out_features
        padding = -width % HIDDEN
        self._model, self._voxels = model, voxels
        self._chunk, self._parts = chunk, channels[-1] // chunk
        self._hidden_parts = (width + padding) // HIDDEN
        with torch.no_grad():
            weights = _first_weights(first.linear, model)
            inputs = max(MIN_EXTENT, 1 << (len(weights) - 1).bit_length())
            self._first_weights = F.pad(weights, (0, padding, 0, inputs - len(weights)))
            self._point_weights = self._tiled(F.pad(second.linear.weight[:, :width], (0, padding)))
            self._voxel_weights = self._tiled(F.pad(second.linear.weight[:, width:], (0, padding)))
            self._bias = second.linear.bias.detach().clone()
        self._limits = torch.tensor([model.point_cloud_range[:3], model.voxel_size], device=self._bias.device)
        self._maxima = torch.full(
            (voxels, width + padding + channels[-1]), -(2**31), dtype=torch.int32, device=self._bias.device
        )

    def __call__(self, voxels: FusedVoxels) -> Tensor:
        """(V, D) float16 features; never waits for the device."""
        from dsvt_ros.kernels import pillar_encoder as kernels

        grid, segments = voxels.grid, voxels.segments
        assert len(grid.cell_of_voxel) == self._voxels
        nx, ny, nz = grid.size
        sizes = {
            "POINTS": SEGMENT_POINTS,
            "HIDDEN": HIDDEN,
            "HIDDEN_PARTS": self._hidden_parts,
            "CHUNK": self._chunk,
            "PARTS": self._parts,
            "ROWS": ROWS,
            "num_warps": 4,
        }
        features = torch.empty(self._voxels, len(self._bias), dtype=torch.float16, device=self._bias.device)
        kernels.encode_segments[(-(-len(segments.voxel) // ROWS),)](
            voxels.points, grid.cell_of_voxel, segments.points_in_voxel, segments.offset_sum, segments.voxel,
            segments.point, segments.num_segments, self._limits, self._first_weights, self._point_weights,
            self._voxel_weights, self._bias, self._maxima, features,
            COLUMNS=len(self._model.features),
            INPUTS=len(self._first_weights),
            NX=nx,
            NY=ny,
            NZ=nz,
            SCALE=OFFSET_SCALE,
            **sizes,
        )  # fmt: skip
        kernels.finish_voxels[(-(-self._voxels // ROWS),)](
            segments.points_in_voxel, grid.num_voxels, self._voxel_weights, self._bias, self._maxima, features,
            **sizes,
        )  # fmt: skip
        return features

    def _tiled(self, weight: Tensor) -> Tensor:
        """A weight (D, H) as float16 tiles [h, d]: (D / chunk, H / HIDDEN, HIDDEN, chunk)."""
        half = weight.view(self._parts, self._chunk, self._hidden_parts, HIDDEN).permute(0, 2, 3, 1).half().contiguous()
        if not torch.isfinite(half).all():
            raise EngineError(
                f"the pillar encoder holds weights up to {weight.abs().max():.3g}, beyond the range of float16 "
                f"(65504); use torch"
            )
        return half


def _first_weights(linear: nn.Linear, model: ModelConfig) -> Tensor:
    """(C + 7, H): weights of a point, its x, y, z from the voxel's corner; of corner and mean - corner; the bias.

    The network's own inputs are the point, point - mean, and point - centre.
    """
    weight = linear.weight.detach().T
    columns = len(model.features)
    xyz, mean, center = weight[:3], weight[columns : columns + 3], weight[columns + 3 :]
    half_extent = torch.tensor(model.voxel_size, device=weight.device) / 2
    bias = linear.bias - half_extent @ center
    return torch.cat([xyz + mean + center, weight[3:columns], xyz, -mean, bias[None]])
