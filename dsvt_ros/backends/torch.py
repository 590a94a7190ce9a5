"""The networks in PyTorch, on CPU or CUDA; what every other backend is verified against."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.structures import HeadMaps, SetPartition


class TorchNetworks:
    """Both networks of `model`, with all that inference can work out beforehand; `model` is left as it is."""

    name = "torch"
    precision = "fp32"
    max_voxels: int | None = None
    channels_last = True

    def __init__(self, model: DSVT) -> None:
        modules = inference_modules(model)
        self._sparse, self._backbone_2d, self._head = modules.backbone_3d, modules.backbone_2d, modules.head
        for network in (self._backbone_2d, self._head):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) of the last stage."""
        output: Tensor = self._sparse(features, partition)
        return output

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to what the head says."""
        maps: HeadMaps = self._head(self._backbone_2d(bev))
        return maps
