"""The height of the ground in clouds of any size up to a capacity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.ground import ground_height
from dsvt_ros.preprocess import is_return


class PaddedGroundFinder:
    """What `fused.ground.GroundFinder` does, in operations of PyTorch."""

    def __init__(self, model: ModelConfig, device: torch.device, points: int, clouds: int = 1) -> None:
        """Make tables; see `fused.ground.GroundFinder`."""
        self._ground_z, self._clouds = model.ground_z, clouds
        self._row = torch.arange(points, dtype=torch.int32, device=device)

    def __call__(self, points: Tensor, ends: Tensor, seeks: Tensor, poses: Tensor, config: PreprocessConfig) -> None:
        """Write into `poses` at what height the sensors are; never waits for the device.

        Args:
            points: (N, C) float32, x, y, z first, in the sensor's frame.
            ends: (B,) int32, row after each cloud's last point. Rows after the last end count for nothing.
            seeks: (B,) int32, 0 for clouds whose ground nobody wants.
            poses: (B, 3, 4) float32, of which z becomes the one that puts the ground where the model has it.
            config: What is no return.
        """
        cloud = torch.searchsorted(ends, self._row, right=True)
        returns = is_return(points, config)
        for number in range(self._clouds):
            own = returns & (cloud == number)
            height = ground_height(torch.where(own[:, None], points[:, :3], math.nan))
            z = poses[number, 2, 3]
            z.copy_(torch.where(seeks[number] != 0, self._ground_z - height, z))
