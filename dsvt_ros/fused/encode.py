"""The pillar encoder in three kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.extents import MIN_EXTENT, power_of_two
from dsvt_ros.fused.launch import is_hopper
from dsvt_ros.fused.structures import OFFSET_SCALE, SEGMENT_POINTS, FusedVoxels
from dsvt_ros.fused.weights import half
from dsvt_ros.model.pillar_encoder import PillarEncoder, PointNetLayer

HIDDEN = 32
"""Channels of the first layer in a block; the layer is padded to a multiple of it."""
MAX_CHUNK = 64
MAX_PARTS = 4
MAX_PIECE = 32
"""Columns that are cleared at once."""
DEALT_ROWS = 128
"""Segments of a program that makes lists."""
ROWS = 64
"""Segments of a program that encodes."""
FINISHED_ROWS = 16
"""Voxels of a program that finishes them: few, so that there are many programs."""
WARPS = 4
REGISTERS = 168
"""Of a thread: three programs fit into a multiprocessor of 64 Ki registers."""
CLASSES = SEGMENT_POINTS.bit_length() + 1
"""Of segments: those of voxels with several ones, and the others by length."""


class FusedEncoder:
    """What `PillarEncoder` does, in float16; the inputs of the first layer and its weights as sums of two of them.

    Calls leave nothing behind. They launch on the current CUDA device, which must be that of the tensors.
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
            inputs = max(MIN_EXTENT, power_of_two(len(weights)))
            weights = F.pad(weights, (0, padding, 0, inputs - len(weights)))
            high = half(weights)
            # Each input is the sum of two terms, each of which is multiplied by both terms of its weight.
            terms = torch.stack([high, half(weights - high)] * 2, 1).flatten(0, 1)
            self._first_weights = terms.view(4 * inputs, -1, HIDDEN).transpose(0, 1).contiguous()
            self._point_weights = self._tiled(F.pad(second.linear.weight[:, :width], (0, padding)))
            self._voxel_weights = self._tiled(F.pad(second.linear.weight[:, width:], (0, padding)))
            self._bias = second.linear.bias.detach().clone()
        self._limits = torch.tensor([model.point_cloud_range[:3], model.voxel_size], device=self._bias.device)

    def __call__(self, voxels: FusedVoxels) -> Tensor:
        """(V, D) float16 features; never waits for the device."""
        from dsvt_ros.kernels import pillar_encoder as kernels

        grid, segments = voxels.grid, voxels.segments
        assert len(grid.cell_of_voxel) == self._voxels
        nx, ny, nz = grid.size
        capacity, channels, device = len(segments.voxel), len(self._bias), self._bias.device
        width = self._hidden_parts * HIDDEN + channels
        lists = torch.empty(CLASSES + 1, capacity, dtype=torch.int32, device=device)
        list_lengths = torch.zeros(CLASSES + 1, dtype=torch.int32, device=device)
        maxima = torch.empty(self._voxels, width, dtype=torch.int32, device=device)
        features = torch.empty(self._voxels, channels, dtype=torch.float16, device=device)
        sizes = {
            "HIDDEN": HIDDEN,
            "HIDDEN_PARTS": self._hidden_parts,
            "CHUNK": self._chunk,
            "PARTS": self._parts,
            "num_warps": WARPS,
        }
        kernels.deal_segments[(-(-capacity // DEALT_ROWS),)](
            segments.points_in_voxel, segments.voxel, segments.point, segments.num_segments, lists, list_lengths,
            maxima, capacity,
            POINTS=SEGMENT_POINTS,
            CLASSES=CLASSES,
            LISTS=1 << CLASSES.bit_length(),
            WIDTH=width,
            PIECE=min(width & -width, MAX_PIECE),
            ROWS=DEALT_ROWS,
        )  # fmt: skip
        # Each class may leave one program half empty.
        kernels.encode_segments[(capacity // ROWS + CLASSES,)](
            voxels.points, grid.cell_of_voxel, segments.points_in_voxel, segments.offset_sum, segments.voxel,
            segments.point, lists, list_lengths, self._limits, self._first_weights, self._point_weights,
            self._voxel_weights, self._bias, maxima, features, capacity,
            COLUMNS=len(self._model.features),
            INPUTS=self._first_weights.shape[1] // 4,
            NX=nx,
            NY=ny,
            NZ=nz,
            SCALE=OFFSET_SCALE,
            POINTS=SEGMENT_POINTS,
            CLASSES=CLASSES,
            ROWS=ROWS,
            RESIDENT=is_hopper(device),  # its tensor cores read weights from shared memory
            maxnreg=REGISTERS,
            **sizes,
        )  # fmt: skip
        kernels.finish_voxels[(-(-self._voxels // FINISHED_ROWS),)](
            lists[-1], list_lengths[-1:], self._voxel_weights, self._bias, maxima, features, ROWS=FINISHED_ROWS, **sizes
        )
        return features

    def _tiled(self, weight: Tensor) -> Tensor:
        """A weight (D, H) as float16 tiles [h, d]: (D / chunk, H / HIDDEN, HIDDEN, chunk)."""
        tiles = weight.view(self._parts, self._chunk, self._hidden_parts, HIDDEN).permute(0, 2, 3, 1)
        return half(tiles)


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
