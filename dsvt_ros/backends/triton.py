"""The networks in float16 kernels of our own; `fused.frame` runs whole frames of them."""

from __future__ import annotations

import importlib.util
import os
import re

import torch
from torch import Tensor

from dsvt_ros.backends.frames import FirstStages, FrameNetworks, on_device
from dsvt_ros.capacity import default_voxels
from dsvt_ros.config import PostprocessConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.boxes import FusedBoxFinder
from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.fused.dense import open_dense
from dsvt_ros.fused.encode import FusedEncoder
from dsvt_ros.fused.ground import GroundFinder
from dsvt_ros.fused.partition import FusedPartition
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.sparse import FusedBackbone3d
from dsvt_ros.fused.structures import Grid
from dsvt_ros.fused.voxelize import Voxelizer
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import SetPartition

MIN_CAPABILITY = (8, 0)
"""Of the GPU: what Triton itself supports."""
MIN_TRITON = (3, 6)
MAX_ELEMENTS = 2**31 - 1
"""Of a tensor: kernels count in 32 bits."""


class TritonNetworks(FrameNetworks):
    """Both networks of `model`, which is left as it is, in kernels.

    Attributes:
        encoder: The pillar encoder, batch norms folded.
    """

    name = "triton"
    otherwise = "use torch or tensorrt"

    def __init__(self, model: DSVT) -> None:
        """Make ready and compile.

        Raises:
            EngineError: Triton is missing or cannot compile here, or the model has sizes that the kernels do not take.
        """
        self.device = next(model.parameters()).device
        require_triton(self.device)
        self._model = model.config
        self.encoder = folded_copy(model.vfe)
        FusedEncoder(self.encoder, model.config, 1)  # raises what any other would
        backbone_2d, head = folded_copy(model.backbone_2d), folded_copy(model.dense_head)
        config = model.config.backbone_3d
        try:
            with torch.inference_mode(), on_device(self.device):
                self.backbone_3d = FusedBackbone3d(folded_copy(model.backbone_3d), config, self.device)
                self.peak_head = PeakHead(head) if isinstance(head, CenterHead) else None
                self.dense_network = open_dense(
                    backbone_2d, self.peak_head or head, self._model, self._room(), config.channels
                )
                # Once, so that what keeps Triton from compiling (no C compiler, for one) is known at the start.
                voxel = torch.zeros(1, 4, dtype=torch.int32, device=self.device)
                self.sparse(torch.zeros(1, config.channels, device=self.device), partition_sets(voxel, self._model))
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"Triton cannot compile or run its kernels here; use torch or tensorrt: {error}"
            ) from error

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) float16 of the last stage."""
        if features.numel() * 3 > MAX_ELEMENTS:  # queries, keys and values
            raise EngineError(f"{features.shape[0]} voxels are more than backend triton can number; use torch")
        return super().sparse(features, partition)

    def first_stages(self, points: int, voxels: int, clouds: int) -> FirstStages:
        """See `FrameNetworks`."""
        return FirstStages(
            Voxelizer(self._model, self.device, points, voxels, clouds),
            FusedEncoder(self.encoder, self._model, voxels),
            FusedPartition(self._model, self.device, voxels, clouds),
        )

    def ground_finder(self, points: int, clouds: int) -> GroundFinder:
        """See `FrameNetworks`."""
        return GroundFinder(self._model, self.device, points, clouds)

    def decoder(self) -> CloudDecoder:
        """See `FrameNetworks`."""
        return CloudDecoder(self.device, len(self._model.features))

    def box_finder(self, config: PostprocessConfig) -> FusedBoxFinder:
        """See `FrameNetworks`."""
        return FusedBoxFinder(self._model, config, self.peak_head, self.device)

    def _room(self) -> Grid:
        """A grid with room for the pillars of one cloud."""
        nx, ny, _ = size = self._model.stage_grids[-1]
        pillars = min(default_voxels(self._model), nx * ny)
        counts = [torch.zeros(count, dtype=torch.int32, device=self.device) for count in (nx * ny, pillars, 1)]
        return Grid(size, *counts)


def require_triton(device: torch.device) -> None:
    """Check that Triton is here and can use the device; `EngineError` if not."""
    if importlib.util.find_spec("triton") is None:
        raise EngineError("backend triton: install triton; a Jetson without it uses torch or tensorrt")
    import triton

    if _release(triton.__version__) < MIN_TRITON:
        raise EngineError(
            f"backend triton needs Triton {'.'.join(map(str, MIN_TRITON))} or later, as it comes with PyTorch; this is "
            f"{triton.__version__}: use torch or tensorrt"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if device.type != "cuda":
        raise EngineError(f"backend triton needs a CUDA device, not {device}; use torch or onnxruntime")
    if not torch.cuda.is_available():
        raise EngineError("backend triton finds no CUDA device; use torch or onnxruntime")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise EngineError(
            f"backend triton needs a GPU of compute capability {'.'.join(map(str, MIN_CAPABILITY))} or higher; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}: use torch or tensorrt"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
