"""The networks in half precision and PyTorch's operations, as parts of whole frames: for GPUs without Triton."""

from __future__ import annotations

import torch

from dsvt_ros.backends.frames import FirstStages, FrameNetworks
from dsvt_ros.config import PostprocessConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.model.transfusion_head import TransFusionHead
from dsvt_ros.padded.boxes import PaddedBoxFinder
from dsvt_ros.padded.dense import LibraryConvolutions
from dsvt_ros.padded.encode import PaddedEncoder
from dsvt_ros.padded.ground import PaddedGroundFinder
from dsvt_ros.padded.partition import PaddedPartition
from dsvt_ros.padded.peak_head import PaddedPeakHead
from dsvt_ros.padded.sparse import PaddedBackbone3d
from dsvt_ros.padded.voxelize import PaddedVoxelizer


class TorchFrameNetworks(FrameNetworks):
    """Both networks of `model`, which is left as it is, in operations of PyTorch."""

    name = "torch"
    otherwise = "set engine.precision to fp32"

    def __init__(self, model: DSVT) -> None:
        """Make ready.

        Raises:
            EngineError: Weights beyond the range of float16.
        """
        self.device = next(model.parameters()).device
        self._model = config = model.config
        with torch.inference_mode():
            self._encoder = PaddedEncoder(folded_copy(model.vfe), config)
            self.backbone_3d = PaddedBackbone3d(folded_copy(model.backbone_3d), config.backbone_3d, self.device)
            head = folded_copy(model.dense_head)
            self.peak_head = PaddedPeakHead(head) if isinstance(head, CenterHead) else None
            dense_head = self.peak_head or head
            assert isinstance(dense_head, (PaddedPeakHead, TransFusionHead))
            self.dense_network = LibraryConvolutions(folded_copy(model.backbone_2d), dense_head, config)

    def first_stages(self, points: int, voxels: int, clouds: int) -> FirstStages:
        """See `FrameNetworks`."""
        return FirstStages(
            PaddedVoxelizer(self._model, self.device, points, voxels, clouds),
            self._encoder,
            PaddedPartition(self._model, self.device, voxels, clouds),
        )

    def ground_finder(self, points: int, clouds: int) -> PaddedGroundFinder:
        """See `FrameNetworks`."""
        return PaddedGroundFinder(self._model, self.device, points, clouds)

    def box_finder(self, config: PostprocessConfig) -> PaddedBoxFinder:
        """See `FrameNetworks`."""
        return PaddedBoxFinder(self._model, config, self.peak_head, self.device)


def require_half_precision(device: torch.device) -> None:
    """Check that torch runs in half precision on the device; `EngineError` if not."""
    if device.type != "cuda":
        raise EngineError(f"backend torch runs in half precision on a CUDA device only, not on {device}")
