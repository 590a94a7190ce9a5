"""The networks in float16 kernels of our own; `fused.frame` runs whole frames of them."""

from __future__ import annotations

import importlib.util
import os
import re
from itertools import pairwise

import torch
from torch import Tensor

from dsvt_ros.capacity import default_voxels
from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.dense import PeakMaps, open_dense
from dsvt_ros.fused.encode import FusedEncoder
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.sparse import FusedBackbone3d
from dsvt_ros.fused.structures import FusedStage, Grid, ShiftSets
from dsvt_ros.model.center_head import CenterHead, maps_from_branches
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.postprocess import class_groups
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import HeadMaps, SetPartition, VoxelSets

MIN_CAPABILITY = (8, 0)
"""Of the GPU: what Triton itself supports."""
MIN_TRITON = (3, 6)
MAX_ELEMENTS = 2**31 - 1
"""Of a tensor: kernels count in 32 bits."""


class TritonNetworks:
    """Both networks of `model`, which is left as it is.

    A detector runs them as parts of `FusedFrames`. The methods here, which verification calls, run the same kernels on
    partitions and maps as other backends have them.

    Attributes:
        encoder: The pillar encoder, batch norms folded.
        backbone_3d: Set attention.
        dense_network: From features of pillars to what the head says.
        peak_head: CenterHead's branches at peaks; None with another head.
    """

    name = "triton"
    precision = "fp16"
    max_voxels: int | None = None
    channels_last = True

    def __init__(self, model: DSVT) -> None:
        """Make ready and compile.

        Raises:
            EngineError: Triton is missing or cannot compile here, or the model has sizes that the kernels do not take.
        """
        self._device = next(model.parameters()).device
        require_triton(self._device)
        self._model: ModelConfig = model.config
        self.encoder = folded_copy(model.vfe)
        FusedEncoder(self.encoder, model.config, 1)  # raises what any other would
        backbone_2d, head = folded_copy(model.backbone_2d), folded_copy(model.dense_head)
        config = model.config.backbone_3d
        try:
            with torch.inference_mode(), on_device(self._device):
                self.backbone_3d = FusedBackbone3d(folded_copy(model.backbone_3d), config, self._device)
                self.peak_head = PeakHead(head) if isinstance(head, CenterHead) else None
                self.dense_network = open_dense(
                    backbone_2d, self.peak_head or head, self._model, self._room(), config.channels
                )
                # Once, so that what keeps Triton from compiling (no C compiler, for one) is known at the start.
                voxel = torch.zeros(1, 4, dtype=torch.int32, device=self._device)
                self.sparse(torch.zeros(1, config.channels, device=self._device), partition_sets(voxel, self._model))
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
        with on_device(self._device):
            return self.backbone_3d(features.half(), fused_stages(partition))

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to what the head says, in float32.

        Every cell is taken for a pillar, and every pillar for a peak.
        """
        clouds, _, rows, columns = bev.shape
        cells = torch.arange(clouds * columns * rows, dtype=torch.int32, device=bev.device)
        features = bev.half().permute(0, 3, 2, 1).reshape(len(cells), -1)
        with on_device(self._device):
            maps = self.dense_network(features, Grid((columns, rows, 1), cells, cells, cells.new_tensor([len(cells)])))
            if not isinstance(maps, PeakMaps):
                return maps
            assert self.peak_head is not None
            groups = len(class_groups(self._model))
            shape = maps.logits.shape[-2:]
            index = torch.arange(shape.numel(), dtype=torch.int32, device=bev.device)
            values = self.peak_head.at_peaks(maps.shared, index.expand(clouds, groups, -1).contiguous())
        # (B, G, cells, columns) to one map a branch, group after group.
        first = [*self.peak_head.columns.values(), values.shape[-1]]
        branches = {
            name: values[..., begin:end].transpose(2, 3).reshape(clouds, -1, *shape)
            for name, (begin, end) in zip(self.peak_head.columns, pairwise(first), strict=True)
        }
        return maps_from_branches({"hm": maps.logits.float(), **branches})

    def _room(self) -> Grid:
        """A grid with room for the pillars of one cloud."""
        nx, ny, _ = size = self._model.stage_grids[-1]
        pillars = min(default_voxels(self._model), nx * ny)
        counts = [torch.zeros(count, dtype=torch.int32, device=self._device) for count in (nx * ny, pillars, 1)]
        return Grid(size, *counts)


def fused_stages(partition: SetPartition) -> tuple[FusedStage, ...]:
    """A partition as the kernels want it."""
    stages = []
    for stage in partition.stages:
        count = stage.cells[0].new_tensor([len(stage.cells[0])], dtype=torch.int32)
        grid = Grid((0, 0, 0), count, count, count)  # of which set attention wants the number of voxels alone
        sets = tuple(None if sets is None else _ragged(sets) for sets in stage.sets)
        cells = stage.cells[0].int(), stage.cells[1].int()
        pooled = None
        if stage.pooling is not None:
            pooled = torch.where(stage.pooling.mask, -1, stage.pooling.indices).int()
        stages.append(FusedStage(grid, cells, (sets[0], sets[1]), pooled))
    return tuple(stages)


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


def on_device(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _ragged(sets: VoxelSets) -> ShiftSets:
    real = ~sets.mask
    count = real[0].sum(1, dtype=torch.int32)
    start = torch.zeros(len(count) + 1, dtype=torch.int32, device=count.device)
    start[1:] = torch.cumsum(count, 0)
    order = torch.stack([indices[kept] for indices, kept in zip(sets.indices, real, strict=True)]).int()
    return ShiftSets(order, torch.argsort(order).int(), start, start.new_tensor([len(count)]))
