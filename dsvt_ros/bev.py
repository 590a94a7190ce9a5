"""Voxel features to a bird's-eye-view map."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_bev(
    features: Tensor, coords: Tensor, grid: tuple[int, int, int], batch_size: int, *, channels_last: bool = True
) -> Tensor:
    """Place every pillar's feature in its cell; empty cells are zero.

    Args:
        features: (V, D) features.
        coords: (V, 4) int32 ``(batch, z, y, x)`` with z = 0.
        grid: Cells in x, y, z.
        batch_size: Number of clouds B.
        channels_last: Memory order of the map: channels last, or contiguous.

    Returns:
        (B, D, H, W) map, H along y, W along x.
    """
    nx, ny, _ = grid
    batch, _, y, x = coords.long().unbind(1)
    channels = features.shape[1]
    if not channels_last:
        index = (batch[:, None], torch.arange(channels, device=features.device), (y * nx + x)[:, None])
        bev = features.new_zeros(batch_size, channels, ny * nx).index_put_(index, features)
        return bev.view(batch_size, channels, ny, nx)
    bev = features.new_zeros(batch_size * ny * nx, channels)
    bev = bev.index_put(((batch * ny + y) * nx + x,), features)
    return bev.view(batch_size, ny, nx, -1).permute(0, 3, 1, 2)
